"""One module per part of the page: components and events, and nothing that is not about them."""
