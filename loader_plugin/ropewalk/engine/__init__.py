"""Text in, text out: requests, their queue, their caches, their pieces of text."""
