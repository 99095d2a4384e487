"""LoRAs: what a request names, the files, their matrices, and weighted sets of them."""
