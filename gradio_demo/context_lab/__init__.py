"""The context lab."""
