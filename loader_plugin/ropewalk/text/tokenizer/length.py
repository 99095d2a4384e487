"""Whether a text can fit a context, found without tokenising more of it than necessary.

    its bytes / the longest token's bytes > context   ->   too long, by arithmetic
    its beginning has twice the context's tokens      ->   too long, whatever follows
    else                                              ->   tokenise it

Tokenising 10 MB takes 20 s and 800 MB: too much for a text that cannot fit anyway.
"""

from __future__ import annotations

from ropewalk.base.errors import ContextLengthError
from ropewalk.text.tokenizer.base import Tokenizer

BEGINNING = 8  # characters for each token of the context: twice what English needs


def encode_fitting(tokenizer: Tokenizer, text: str, context_size: int, add_bos: bool | None = None) -> list[int]:
    """As `Tokenizer.encode`, for texts that can fit the context; the result may still be too long.

    Raises:
        ContextLengthError: the text has more tokens than the context. RequestError: as `Tokenizer.encode`.
    """
    if not isinstance(text, str) or len(text) <= context_size:
        return tokenizer.encode(text, add_bos)
    longest = tokenizer.longest_token_bytes
    if longest is not None:
        fewest = -(-len(text.encode("utf-8", "surrogatepass")) // longest)
        if fewest > context_size:
            raise ContextLengthError.of(fewest, context_size, at_least=True)
    if len(text) > BEGINNING * context_size:
        # A cut changes only the tokens next to it: with twice as many as fit, the whole text cannot fit either.
        found = len(tokenizer.encode(text[: BEGINNING * context_size], add_bos=False))
        if found > 2 * context_size:
            raise ContextLengthError.of(found, context_size, at_least=True)
    return tokenizer.encode(text, add_bos)
