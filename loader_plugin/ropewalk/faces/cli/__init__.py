"""The command `ropewalk`."""
