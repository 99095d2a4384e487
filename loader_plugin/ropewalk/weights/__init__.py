"""A model's weights out of a checkpoint: every tensor checked by its header, then read layer by layer."""
