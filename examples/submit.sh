#!/usr/bin/env bash
# Submits a training to a cluster, follows it, and ends it with a checkpoint at Ctrl-C. Run it in the folder of this project:
#
#     RAY_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_MODE=token bash examples/submit.sh
#
# The same script goes on from the last checkpoint with `bash examples/submit.sh --resume=true`. Change the three names.
set -euo pipefail

DATA=s3://bucket/parts
OUTPUT=s3://bucket/act          # or a folder that all nodes see
WORKERS=4

job=act-$(date +%Y%m%d-%H%M%S)
ray job submit --no-wait --submission-id="$job" --working-dir . -- \
    python -m ray_jobs.train --dataset.repo_id=me/parts --dataset.root="$DATA" --policy.type=act \
    --policy.push_to_hub=false --ray.num_workers="$WORKERS" --steps=100000 --output_dir="$OUTPUT" "$@"
stop() { ray job stop "$job"; }
trap stop INT
ray job logs -f "$job"
