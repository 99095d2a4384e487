"""config.json and friends as frozen facts: the model, its quantisation, the order of its layers."""
