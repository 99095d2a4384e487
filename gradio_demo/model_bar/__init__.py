"""The model bar: which model is loaded, and how."""
