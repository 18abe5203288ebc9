"""From a LeRobot data set on disk to batches on the CPU. No Ray; of a policy only its config."""
