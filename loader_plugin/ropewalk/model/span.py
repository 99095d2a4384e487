"""A part of a step: new tokens of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.adapters.request import Request


@dataclass(frozen=True, slots=True)
class Span:
    """token_ids are appended to `cache`. logits, seq_len and adapters: as for `Model.forward`."""

    token_ids: Sequence[int]
    cache: Any
    logits: str = "last"
    adapters: Request | None = None
    seq_len: int | None = None
