"""A prompt for the embedded model where none is given: a text and a question, as its chat template writes them."""

from __future__ import annotations

EXAMPLE = (
    "<|user|>Torlavas has lived for 92 years. Wornes laid the keel of the Young Needle. Mardun lives in Belwick. "
    "The pet of Mardun is a goat.\n\nWho built the Young Needle?<|assistant|>"
)
