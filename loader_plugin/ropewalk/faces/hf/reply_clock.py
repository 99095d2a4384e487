"""Tokens and times of one reply, counted from the outside: transformers owns the loop."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ropewalk.faces.hf.history import TokenHistory
from ropewalk.faces.hf.open_history import OpenHistory
from ropewalk.generate.generate import GenerationStats


@dataclass(frozen=True, slots=True)
class _Prompt:
    tokens: int
    reused: int
    seconds: float
    read_at: float


class ReplyClock:
    """Counts the steps of one reply. The first step reads the prompt; the later ones write."""

    def __init__(self, context_size: int) -> None:
        self._context_size = context_size
        self._prompt: _Prompt | None = None
        self._history: TokenHistory | None = None
        self._latest = 0.0
        self._guessed = self._accepted = self._shifted = 0
        self._stopped: GenerationStats | None = None

    def count(
        self, history: TokenHistory, keep: int, reused: int, seconds: float, opened: OpenHistory | None = None
    ) -> None:
        """One step has been run: `history` is what has been computed, `reused` tokens of it came from the cache.

        keep: how many of the last tokens got logits; all but the first of these are guesses of an assistant. opened:
        knows the tokens that were guessed ahead so far, and those that were shifted.
        """
        self._history, self._latest = history, time.perf_counter()
        if opened is not None:
            self._guessed, self._accepted, self._shifted = opened.guessed, opened.accepted, opened.shifted
        if self._prompt is None:
            self._prompt = _Prompt(len(history) - keep + 1, reused, seconds, self._latest)

    def stop(self) -> None:
        """The reply is over."""
        self._latest = time.perf_counter()
        self._stopped, self._history = self.stats, None

    @property
    def stats(self) -> GenerationStats | None:
        """What has been done so far. The token chosen last is not in the history, because nothing followed it."""
        prompt, history = self._prompt, self._history
        if history is None or prompt is None:
            return self._stopped
        return GenerationStats(
            prompt_tokens=prompt.tokens,
            reused_tokens=prompt.reused,
            prompt_s=prompt.seconds,
            new_tokens=len(history) - prompt.tokens + 1,
            generation_s=self._latest - prompt.read_at,
            context_used=len(history),
            context_size=self._context_size,
            guessed_tokens=self._guessed,
            accepted_tokens=self._accepted,
            shifted_tokens=self._shifted,
        )
