"""Generation in token ids: prompt in, one step per new token out. Knows nothing of text.

    forward the prompt -> choose -> forward the chosen token -> choose -> ...

A chosen token is forwarded only when another one is wanted, so a reply can fill the context to its last position.
Guesses of the tokens after it may be forwarded with it. The next tokens are then chosen from the rows of logits, one
after the other, as they would be without guesses, up to the first that was guessed wrong.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from ropewalk.generate.context_shift import ContextShift
from ropewalk.generate.dry import Breakers
from ropewalk.generate.guesses import Guesses
from ropewalk.generate.sampling import Sampler, SamplingParams, top_logprobs
from ropewalk.generate.scheduler.sequence import Cancelled, Progress, Sequence

__all__ = ["Cancelled", "Generation", "GenerationStats", "Progress", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One new token; its log probability and the most likely alternatives where `SamplingParams.logprobs` asks."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What a reply took. `reused_tokens` of the prompt were in the cache; the others took `prompt_s`.

    `new_tokens` counts tokens chosen, an end token included; `generation_s` is the time from the end of the prompt.
    Of the tokens guessed ahead, `accepted_tokens` were the ones chosen. `shifted_tokens` were moved down in the cache
    instead of being read again: of the reused ones, or when the reply reached the end of the window, where
    `dropped_tokens` of the oldest went.
    """

    prompt_tokens: int
    reused_tokens: int
    prompt_s: float
    new_tokens: int
    generation_s: float
    context_used: int
    context_size: int
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    shifted_tokens: int = 0
    dropped_tokens: int = 0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Speed of reading the part of the prompt that was not in the cache."""
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def new_tokens_per_s(self) -> float:
        """Speed of writing; the first token comes out of the prompt's own pass, so it does not count."""
        return max(self.new_tokens - 1, 0) / self.generation_s if self.generation_s > 0 else 0.0

    def describe(self) -> str:
        """One line for people."""
        guesses = f"; guessed {self.guessed_tokens}, {self.accepted_tokens} right" if self.guessed_tokens else ""
        shifted = f"; shifted {self.shifted_tokens} instead of reading them again" if self.shifted_tokens else ""
        dropped = f"; dropped the {self.dropped_tokens} oldest" if self.dropped_tokens else ""
        return (
            f"prompt {self.prompt_tokens} tokens ({self.reused_tokens} reused), "
            f"{self.prompt_tokens_per_s:.1f} tokens/s; "
            f"new {self.new_tokens} tokens, {self.new_tokens_per_s:.1f} tokens/s; "
            f"context {self.context_used} of {self.context_size}{guesses}{shifted}{dropped}"
        )


class Generation(Iterator[Step]):
    """The steps of one reply to the prompt of a sequence. `stats` and `finish_reason` are current at any time.

    `progress` is called with (tokens done, tokens to do) while the prompt is read, `cancelled` between the steps of the
    model; `breakers` are the params' dry_sequence_breakers as tokens; `guesses`: who guesses tokens ahead, if anybody;
    `shift`: at the end of the window the oldest tokens go and the reply continues. Without max_new_tokens it then ends,
    with "length", after as many tokens as the window has.
    finish_reason: None while it runs; "stop" (an end token), "length" (max_new_tokens), "context" (the context is
    full), "cancelled" (asked to, or closed early). The end token itself is not a step; `end_token_id` names it.
    """

    def __init__(
        self,
        sequence: Sequence,
        params: SamplingParams,
        end_token_ids: Items[int] = (),
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        breakers: Breakers | None = None,
        guesses: Guesses | None = None,
        shift: ContextShift | None = None,
    ) -> None:
        self.finish_reason: str | None = None
        self.end_token_id: int | None = None
        self._sequence, self._params = sequence, params
        self._token_ids = list(sequence.prompt_ids)  # and those chosen; without what was dropped
        self._breakers, self._guesses, self._shift = breakers, guesses, shift
        self._dropped = 0
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(end_token_ids))
        self._cancelled, self._progress = cancelled or (lambda: False), progress
        self._prompt_tokens, self._new_tokens, self._context_used = len(self._token_ids), 0, 0
        self._guessed = self._accepted = 0
        self._prompt_s = self._generation_s = 0.0
        self._steps = self._run()

    def __next__(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """End early. The sequence keeps what was computed and can be used further."""
        self._steps.close()
        self.finish_reason = self.finish_reason or "cancelled"

    @property
    def stats(self) -> GenerationStats:
        """What has been done so far."""
        return GenerationStats(
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._sequence.reused,
            prompt_s=self._prompt_s,
            new_tokens=self._new_tokens,
            generation_s=self._generation_s,
            context_used=self._context_used,
            context_size=self._sequence.capacity,
            guessed_tokens=self._guessed,
            accepted_tokens=self._accepted,
            shifted_tokens=self._sequence.shifted,
            dropped_tokens=self._dropped,
        )

    def _run(self) -> Iterator[Step]:
        logits = self._read_prompt()  # [1, V]
        if logits is None:
            return
        sampler = Sampler(self._params, list(self._token_ids), self._breakers)
        guesses: list[int] = []
        try:
            while True:
                for row, guess in zip(logits, [*guesses, None], strict=True):  # [V]
                    token_id = yield from self._chosen(sampler, row)
                    self.finish_reason = self.finish_reason or self._reason_to_end()
                    if self.finish_reason is not None:
                        return
                    if token_id != guess:
                        break
                    self._context_used += 1  # it was forwarded with the token before it
                    self._accepted += 1
                self._settle_guesses(len(guesses))
                logits, guesses = self._forward_last()
                if logits is None:
                    self.finish_reason = "cancelled"
                    return
        finally:
            self._forget_wrong()

    def _chosen(self, sampler: Sampler, row: torch.Tensor) -> Generator[Step, None, int]:
        """The next token, chosen from logits [V], as a step; an end token is none, but the reason to end."""
        started = time.perf_counter()
        token_id = sampler.choose(row)
        self._new_tokens += 1
        self._token_ids.append(token_id)
        step = self._step(token_id, row)
        self._generation_s += time.perf_counter() - started
        if token_id in self._ends:
            self.finish_reason, self.end_token_id = "stop", token_id
        else:
            yield step
        return token_id

    def _forward_last(self) -> tuple[torch.Tensor | None, list[int]]:
        """Forward the token chosen last, and guesses after it: (logits of all, [rows, V]; the guesses)."""
        started = time.perf_counter()
        guesses = self._guess()
        logits = self._sequence.forward(
            [self._token_ids[-1], *guesses], logits="all" if guesses else "last", cancelled=self._cancelled
        )
        self._generation_s += time.perf_counter() - started
        self._context_used += logits is not None
        self._guessed += len(guesses)
        return logits, guesses

    def _guess(self) -> list[int]:
        if self._guesses is None:
            return []
        most = self._sequence.capacity - len(self._token_ids)
        if self._params.max_new_tokens is not None:
            most = min(most, self._params.max_new_tokens - self._new_tokens - 1)
        return self._guesses.make(self._sequence, self._token_ids, most)

    def _settle_guesses(self, count: int) -> None:
        """All that could be chosen from the last step has been."""
        if self._guesses is not None and self._new_tokens > 1:
            accepted = self._context_used - (self._sequence.length - count)
            self._guesses.settle(self._sequence, count, accepted)
        self._forget_wrong()

    def _forget_wrong(self) -> None:
        """Guesses that did not come true leave the sequence."""
        if not self._sequence.is_closed and self._sequence.length > self._context_used:
            self._sequence.truncate(self._context_used)

    def _read_prompt(self) -> torch.Tensor | None:
        """Logits after the prompt, [1, V]; None when there is nothing to choose."""
        if self._cancelled():
            self.finish_reason = "cancelled"
            return None
        started = time.perf_counter()
        wanted = "last" if self._params.max_new_tokens != 0 else "none"
        logits = self._sequence.forward(
            self._token_ids, logits=wanted, progress=self._progress, cancelled=self._cancelled
        )
        if logits is not None and self._guesses is not None:
            self._guesses.read(self._token_ids)
        self._prompt_s = time.perf_counter() - started
        self._context_used = self._sequence.length
        if logits is None:
            self.finish_reason = "length" if self._sequence.length == self._prompt_tokens else "cancelled"
        return logits

    def _reason_to_end(self) -> str | None:
        if self._params.max_new_tokens is not None and self._new_tokens >= self._params.max_new_tokens:
            return "length"
        if self._context_used >= self._sequence.capacity:
            if self._shift is None:
                return "context"
            if self._params.max_new_tokens is None and self._new_tokens >= self._sequence.capacity:
                return "length"  # it would never end
            self._make_room(self._shift)
        return "cancelled" if self._cancelled() else None

    def _make_room(self, shift: ContextShift) -> None:
        """The window is full: the oldest tokens go."""
        started = time.perf_counter()
        keep, drop = shift.stretch(self._context_used)
        self._sequence.shift(keep, drop)
        del self._token_ids[keep : keep + drop]
        self._context_used -= drop
        self._dropped += drop
        self._guesses = None  # who guesses has read a text that is no more
        self._generation_s += time.perf_counter() - started

    def _step(self, token_id: int, logits: torch.Tensor) -> Step:
        if self._params.logprobs is None:
            return Step(token_id)
        return Step(token_id, *top_logprobs(logits, token_id, self._params.logprobs))
