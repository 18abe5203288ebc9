"""What depends on which policy it is."""
