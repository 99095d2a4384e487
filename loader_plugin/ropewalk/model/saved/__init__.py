"""Caches in files: what a file says of itself, whom it fits, writing and reading it."""
