"""The front ends. None imports another, except that the command line starts the others when asked to."""
