"""The first embedded model, which continues Python: its training, its numbers, its card."""
