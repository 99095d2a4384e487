"""A folder's tokenizer, whichever of its files contain it."""
