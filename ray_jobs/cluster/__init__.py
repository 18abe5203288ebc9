"""Ray: what the jobs ask of it."""
