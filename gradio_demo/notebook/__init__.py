"""The notebook tab."""
