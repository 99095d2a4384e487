"""How a reply is to be made: settings of the sampler, adapters, and what to do when the context is full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ropewalk.generate.sampling import SamplingParams

SHIFT, DROP, STOP = (
    "drop the oldest turns, shift the rest",
    "drop the oldest turns, read the rest again",
    "stop and say so",
)
OVERFLOW_POLICIES = (SHIFT, DROP, STOP)


@dataclass(frozen=True, slots=True)
class ReplyRequest:
    """How a reply is made. adapters: as `Engine.stream` takes them; overflow: one of OVERFLOW_POLICIES, for chats."""

    params: SamplingParams
    overflow: str = DROP
    adapters: Sequence[tuple[str, float]] = ()


def with_stop(params: SamplingParams, stop: tuple[str, ...]) -> SamplingParams:
    """The settings with the words that end a template's turn as further stops."""
    return replace(params, stop=tuple(dict.fromkeys(params.stop + stop)))
