"""Guessing ahead beneath transformers' loop, which asks for one token at a time.

    asked: t0           computed: t0, and guesses g1, g2 in the same step    answered: the logits after t0
    asked: t1 == g1     computed: nothing                                    answered: the logits after g1
    asked: t2 != g2     computed: t2, and new guesses                        answered: the logits after t2

Whatever chooses the tokens (samplers, processors, guidance) sees the logits that it would have seen without.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch

from ropewalk.engine.speculation import Speculation
from ropewalk.generate.generate import Cancelled
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.plan import INTERACTIVE
from ropewalk.generate.scheduler.sequence import Sequence


class Foresight:
    """Guesses for one reply. guessed, accepted: tokens so far. prompt_ids: what the reply begins with."""

    def __init__(self, speculation: Speculation, prompt_ids: list[int], cancelled: Cancelled) -> None:
        self.guessed = self.accepted = 0
        self._token_ids: list[int] = list(prompt_ids)
        self._ahead: list[tuple[int, torch.Tensor]] = []  # (a guess, the logits after it [1, V]) still to come true
        self._unsettled: tuple[int, int] | None = None  # of the last step: guesses made, guesses that came true
        self._stack = ExitStack()
        self._guesses = self._stack.enter_context(
            speculation.guesses(prompt_ids, SamplingParams(), cancelled, None, INTERACTIVE)
        )

    def close(self) -> None:
        """Nothing more is asked."""
        self._stack.close()

    def read(self) -> None:
        """The tokens so far have been computed, and nothing was guessed."""
        if self._guesses is not None and self._unsettled is None:
            self._guesses.read(self._token_ids)
        self._unsettled = 0, 0

    def follow(self, sequence: Sequence, length: int, token_ids: list[int], keep: int) -> torch.Tensor | None:
        """What is asked for now, after `length` tokens: the logits [1, V] if they are known already."""
        goes_on = length == len(self._token_ids)
        del self._token_ids[length:]
        self._token_ids += token_ids
        if goes_on and keep == len(token_ids) == 1 and self._ahead and self._ahead[0][0] == token_ids[0]:
            self.accepted += 1
            made, right = self._unsettled or (0, 0)
            self._unsettled = made, right + 1
            return self._ahead.pop(0)[1]
        self._ahead.clear()
        if self._guesses is not None and self._unsettled is not None:
            self._guesses.settle(sequence, *self._unsettled)
        return None

    def guesses(self, sequence: Sequence) -> list[int]:
        """What may follow the tokens so far, the last of which is to be computed."""
        if self._guesses is None or self._unsettled is None:
            return []
        return self._guesses.make(sequence, self._token_ids, sequence.capacity - len(self._token_ids))

    def hold(self, guesses: list[int], logits: torch.Tensor) -> torch.Tensor:
        """logits: [1 + guesses, V], after the token asked for and after each guess; returns the first row, [1, V]."""
        first, *rows = logits.split(1)
        self._ahead = list(zip(guesses, rows, strict=True))
        self._unsettled = len(guesses), 0
        self.guessed += len(guesses)
        return first
