"""What was asked for and what is told: frozen dataclasses, errors and the flags that there are; no behaviour."""
