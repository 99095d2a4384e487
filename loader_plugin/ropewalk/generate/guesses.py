"""The guesses of one reply: made before a step, checked by it.

Guessing changes no token: rows of a step do not depend on each other's outcome, and a guess is made only where its rows
are rotated as in a plain run. Under RoPE methods that follow the length, there are no guesses across a length at which
the keys are turned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from itertools import takewhile

from ropewalk.generate.pace import Pace
from ropewalk.generate.scheduler.sequence import Sequence
from ropewalk.generate.speculation import Guesser


class Guesses:
    """Who guesses for one reply, and how much."""

    def __init__(self, guesser: Guesser, pace: Pace | None = None) -> None:
        self._guesser, self._pace = guesser, pace or Pace()
        self._guess_s = 0.0

    def read(self, token_ids: Items[int]) -> None:
        """The prompt has been read."""
        self._guesser.read(token_ids)

    def make(self, sequence: Sequence, token_ids: Items[int], most: int) -> list[int]:
        """At most `most` guesses of what follows these tokens, the last of which is to be forwarded with them."""
        started = time.perf_counter()
        count = min(most, self._pace.wanted(sequence.last_step.num_others))
        guesses = self._guesser.guess(token_ids, count) if count > 0 else []
        guesses = list(takewhile(lambda token_id: token_id < sequence.vocab_size, guesses))  # not rows that only pad
        if guesses and not sequence.rotates_alike(len(token_ids), len(token_ids) + len(guesses)):
            guesses = []
        self._guess_s = time.perf_counter() - started
        return guesses

    def settle(self, sequence: Sequence, guessed: int, accepted: int) -> None:
        """Of the guesses made last, so many were right. A step that read a prompt too says nothing of the price."""
        step = sequence.last_step
        if not step.prompt_rows:
            self._pace.record(guessed, accepted, step.seconds, self._guess_s, step.num_others)
