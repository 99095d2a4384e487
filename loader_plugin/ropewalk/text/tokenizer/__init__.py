"""A folder's tokenizer, whichever of its files hold it."""
