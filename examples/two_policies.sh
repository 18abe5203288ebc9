#!/usr/bin/env bash
# Searches ACT and Diffusion Policy at once for what is both exact and fast: the policy is a choice of the search, and the result
# is a Pareto front of two values, the error of the predicted actions and the time of a prediction.
#
#     uv run bash examples/two_policies.sh
#
# It takes the demo's data set, and ends after an hour with what there is; `--resume=true` behind it goes on.
set -euo pipefail

python -m ray_jobs.tune --space=search_spaces/act.yaml,search_spaces/diffusion.yaml \
    --dataset.repo_id=local/part_sorting --dataset.root=outputs/demo/dataset \
    --tune.metric=val/action_error,val/inference_ms --tune.sampler=nsga2 \
    --steps=2000 --tune.num_samples=32 --tune.time_budget_s=3600 --output_dir=outputs/two_policies "$@"
