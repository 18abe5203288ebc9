"""All that depends on which policy it is, and only that."""
