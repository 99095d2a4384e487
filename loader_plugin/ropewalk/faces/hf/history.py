"""What transformers holds as `past_key_values`: the tokens of one sequence. Keys and values stay with the runner.

A history can be kept, cropped and handed back at any time: whatever the runner's cache holds by then, the tokens say
what has to be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import DynamicCache

INITIAL_ROOM = 1024  # tokens


class TokenHistory(DynamicCache):
    """Token ids computed so far, with the methods of a transformers `Cache` that its generation loops call.

    It is a DynamicCache in name only, because transformers before 4.56 asks for that type before it crops.
    """

    is_compileable = False  # there is no torch graph to compile
    is_croppable = True

    def __init__(self, slot: str = "main") -> None:  # without DynamicCache's own: there are no layers to set up
        self.slot = slot  # which of the runner's caches the sequence is computed in
        self._ids = np.empty(INITIAL_ROOM, dtype=np.int64)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._length} tokens)"

    def __iter__(self) -> Iterator[Any]:
        """Over keys and values by layer, as of any cache of transformers: none of them are here."""
        return iter(())

    @property
    def token_ids(self) -> list[int]:
        """The tokens, as a list of its own."""
        return self._ids[: self._length].tolist()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens."""
        return self._length

    def crop(self, max_length: int) -> None:
        """Drop tokens at the end: keep `max_length` of them or, if it is negative, drop that many.

        0 drops nothing: transformers 5 passes it when all candidates were right, and no version means "all" by it.
        """
        if max_length < 0:
            self._length = max(0, self._length + max_length)
        elif max_length > 0:
            self._length = min(self._length, max_length)

    def activate_past_recording(self) -> None:
        """Called on caches before tokens are rolled back; a history always can be, so there is nothing to do."""

    def common_prefix(self, ids: np.ndarray) -> int:
        """How many leading tokens equal those of ids: [T] integers."""
        limit = min(self._length, len(ids))
        differing = np.flatnonzero(self._ids[:limit] != ids[:limit])
        return int(differing[0]) if len(differing) else limit

    def truncate_(self, length: int) -> None:
        """Keep the first `length` tokens; 0 keeps none."""
        self._length = min(self._length, length)

    def extend_(self, ids: Sequence[int]) -> None:
        """Append tokens."""
        needed = self._length + len(ids)
        if needed > len(self._ids):
            room = np.empty(max(needed, 2 * len(self._ids)), dtype=np.int64)
            room[: self._length] = self._ids[: self._length]
            self._ids = room
        self._ids[self._length : needed] = ids
        self._length = needed
