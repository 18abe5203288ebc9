"""Ray distributed trainer and hyper-parameter tuner for LeRobot policies.

A module at this level is a job: `python -m ray_jobs.train`, `python -m ray_jobs.demo`. What the jobs are
made of lives in `ray_jobs.engine`; what is known of single policies, in `ray_jobs.policies`.
"""
