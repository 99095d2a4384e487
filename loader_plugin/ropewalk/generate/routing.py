"""Which adapter fits a prompt: the one that finds the prompt itself least surprising.

    choice = argmin over loaded adapters and none of  exp( mean over i >= 1 of -log p(token i | tokens 0..i-1) )

Every candidate reads the whole prompt once, so routing costs one reading of the prompt for each of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from ropewalk.base.errors import RequestError
from ropewalk.generate.evaluate import sequence_perplexity
from ropewalk.generate.scheduler.plan import INTERACTIVE
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.scheduler.sequence import Cancelled

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Routing:
    """adapter: the chosen one, None for the model alone. scores: (adapter or None, perplexity of the prompt) of all."""

    adapter: str | None
    scores: tuple[tuple[str | None, float], ...]

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        """The choice as a request for `Model.forward`."""
        return () if self.adapter is None else ((self.adapter, 1.0),)

    def describe(self) -> str:
        """One line for people."""
        scores = ", ".join(f"{name or 'no adapter'} {score:.2f}" for name, score in self.scores)
        return f"routed to {self.adapter or 'no adapter'} by the perplexity of the prompt ({scores})"


def route(
    scheduler: Scheduler,
    prompt_ids: Sequence[int],
    cancelled: Cancelled | None = None,
    client: Hashable = None,
    priority: str = INTERACTIVE,
) -> Routing | None:
    """Score the prompt without and with each loaded adapter; among equals the first wins. None once cancelled.

    The reply finds its prompt computed. client, priority: as for `Scheduler.open`.

    Raises:
        RequestError: the prompt has one token only, so that nothing of it can be scored, or does not fit.
    """
    if len(prompt_ids) < 2:
        raise RequestError('adapters="auto" needs a prompt of at least 2 tokens to score: name the adapters instead')
    scores: list[tuple[str | None, float]] = []
    with torch.inference_mode():
        for name in (None, *scheduler.model.adapters):
            chosen = None if name is None else [(name, 1.0)]
            with scheduler.open(prompt_ids, chosen, client, priority) as sequence:
                score = sequence_perplexity(sequence, cancelled)
            if score is None:
                return None
            scores.append((name, score))
    return Routing(min(scores, key=lambda item: item[1])[0], tuple(scores))
