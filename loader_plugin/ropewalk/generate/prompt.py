"""What a prompt in token ids must be."""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.base.errors import ContextLengthError
from ropewalk.model.token_ids import checked_token_ids


def checked_prompt(vocab_size: int, capacity: int, prompt_ids: Sequence[int]) -> list[int]:
    """The prompt as a list of ids that the model knows and the context can hold.

    Raises:
        RequestError: empty, ids of a wrong type or out of range. ContextLengthError: too long.
    """
    if isinstance(prompt_ids, (list, tuple, range)) and len(prompt_ids) > capacity:  # before looking at each of them
        raise ContextLengthError.of(len(prompt_ids), capacity)
    ids = checked_token_ids(prompt_ids, vocab_size)
    if len(ids) > capacity:
        raise ContextLengthError.of(len(ids), capacity)
    return ids
