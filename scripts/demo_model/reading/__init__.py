"""A small model that answers questions about a text in front of it: its corpus, tokenizer, training and evaluation."""
