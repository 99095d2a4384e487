"""How quantised linears are stored: one file per container, each read into the one plain form of gptq/linear.py."""
