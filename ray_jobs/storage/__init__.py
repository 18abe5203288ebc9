"""Where bytes live, on a disk or in a bucket. Knows nothing of training."""
