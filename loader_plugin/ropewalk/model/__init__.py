"""The decoder: how it is loaded, its layers and its cache, and its layers written out in another order."""
