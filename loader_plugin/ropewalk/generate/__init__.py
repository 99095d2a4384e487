"""From logits to token ids: sampling, generation, perplexity, the choice of an adapter. Knows no text."""
