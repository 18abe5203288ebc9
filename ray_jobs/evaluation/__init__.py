"""Trained policies, opened again, scored and shown."""
