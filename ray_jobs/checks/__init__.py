"""What is wrong with what was asked for, told before anything expensive begins."""
