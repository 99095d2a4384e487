"""A model with its layers in another order, written as a normal checkpoint folder."""
