"""A model folder's files: which hold the weights, and their tensors by name."""
