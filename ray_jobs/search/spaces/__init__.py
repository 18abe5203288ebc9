"""Search spaces: read, checked, and what follows from them."""
