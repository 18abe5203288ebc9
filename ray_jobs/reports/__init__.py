"""Reads the folder of a run or a search, writes one HTML file."""
