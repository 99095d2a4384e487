"""A sequence of a model that nobody else calls, for those who guess."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class LoneSequence:
    """One sequence of a model, in a cache of its own. model: a `Model`, which nobody else may call meanwhile."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, model.new_cache()

    @property
    def length(self) -> int:
        """Positions computed."""
        return self._cache.length

    @property
    def capacity(self) -> int:
        """The most positions that there can be."""
        return self._cache.capacity

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self._model.config.vocab_size

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self._cache.truncate(length)

    def forward(self, token_ids: Sequence[int], logits: str = "last") -> torch.Tensor | None:
        """Append tokens: as `Model.forward`."""
        return self._model.forward(token_ids, self._cache, logits=logits)
