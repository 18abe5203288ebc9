"""What the jobs are made of: recipe, data, loop, objective, checkpoints, tracking."""
