"""What scalings, adapters and layer orders do to a model: comparisons, pass keys, plots."""
