"""Ray distributed trainer and hyper-parameter tuner for LeRobot policies.

A module at this level is a job: `python -m ray_jobs.train`, `python -m ray_jobs.demo`; in a notebook,
`from ray_jobs import train, tune, evaluate` (see `interface`). What the jobs are
made of lives in packages with one rule each, which import downwards only: `reports`, `evaluation` and `search` on
top, then `cluster`, `cli`, `checks`, `training`, `policies`, `data`, `storage` and `config` (see pyproject.toml).
"""
