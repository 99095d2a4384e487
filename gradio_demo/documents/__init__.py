"""The documents tab."""
