"""A model's weights from a checkpoint: every tensor is checked by its header, then read layer by layer."""
