"""Words of a command line to a recipe, events to text on a terminal."""
