#!/usr/bin/env bash
# The configuration of trial 1, the best of search, trained in full.
# More flags may follow and go first, as --ray.num_workers=4 or --output_dir=elsewhere.
python=${PYTHON:-/checkout____/.venv/bin/python}  # the one of the search, if it is here
command -v "$python" > /dev/null || python=python
exec "$python" -m ray_jobs.train \
    --max_eval_samples=64 \
    --wandb.disable_artifact=true \
    --dataset.repo_id=local/numbers \
    --dataset.root=/made___________/numbers \
    --policy.device=cpu \
    --batch_size=4 \
    --num_workers=0 \
    '--data.eval_episodes=[2]' \
    --ray.address=local \
    --policy.push_to_hub=false \
    --assets.dir=/made___________/pretrained \
    --data.eval_horizon=4 \
    --log_freq=1 \
    --policy.type=act \
    --policy.dim_model=8 \
    --policy.n_heads=2 \
    --policy.dim_feedforward=8 \
    --policy.n_encoder_layers=1 \
    --policy.n_vae_encoder_layers=1 \
    --policy.latent_dim=2 \
    --policy.optimizer_lr=0.00016785284945663344 \
    --policy.chunk_size=4 \
    --policy.n_action_steps=4 \
    --policy.use_vae=false \
    --steps=100000 \
    --save_freq=5000 \
    --eval_steps=5000 \
    --env_eval_freq=0 \
    --seed=1000 \
    --output_dir=/made___________/search-best \
    "$@"
