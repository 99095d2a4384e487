"""Text in, text out: requests, the queue they wait in, the caches they use, the text they stream; work in threads."""
