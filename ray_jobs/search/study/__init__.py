"""A search's Optuna study: where it lies, begun or gone on with, asked, rebuilt."""
