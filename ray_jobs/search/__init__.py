"""A search: Optuna's side of it, its trials and results; Ray Tune in one module, `ray_tune`."""
