"""What each architecture needs: its tensors as a table, checked, then read."""
