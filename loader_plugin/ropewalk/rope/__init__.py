"""RoPE scaling: how it is spelled, what was decided, and its mathematics as tables."""
