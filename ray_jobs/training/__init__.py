"""A training, its validation and what it leaves: torch, LeRobot and accelerate. Never Ray."""
