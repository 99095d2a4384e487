"""Generation in token ids: prompt in, one step per new token out. Knows nothing of text.

    reuse the cached prefix -> forward the rest of the prompt -> choose -> forward the chosen token -> choose -> ...

A chosen token is forwarded only when another one is wanted, so a reply can fill the context to its last position.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ropewalk.adapters.request import Request
from ropewalk.base.errors import ContextLengthError
from ropewalk.config.model import ModelConfig
from ropewalk.generate.dry import Breakers
from ropewalk.generate.sampling import Sampler, SamplingParams, top_logprobs
from ropewalk.model.model import checked_token_ids

Progress = Callable[[int, int], None]
Cancelled = Callable[[], bool]


class CacheLike(Protocol):
    """What generation needs of a `cache.KvCache`."""

    @property
    def length(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    def truncate(self, length: int) -> None: ...


class ModelLike(Protocol):
    """What generation needs of a `model.Model`."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def adapters(self) -> tuple[str, ...]: ...
    def reusable_prefix(self, cache: CacheLike, token_ids: Sequence[int], adapters: Request | None = None) -> int: ...
    def forward(
        self,
        token_ids: Sequence[int],
        cache: CacheLike,
        logits: str = "last",
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
        seq_len: int | None = None,
        adapters: Request | None = None,
    ) -> torch.Tensor | None: ...


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
    """

    prompt_tokens: int
    reused_tokens: int
    prompt_s: float
    new_tokens: int
    generation_s: float
    context_used: int
    context_size: int

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
        return (
            f"prompt {self.prompt_tokens} tokens ({self.reused_tokens} reused), "
            f"{self.prompt_tokens_per_s:.1f} tokens/s; "
            f"new {self.new_tokens} tokens, {self.new_tokens_per_s:.1f} tokens/s; "
            f"context {self.context_used} of {self.context_size}"
        )


class Generation(Iterator[Step]):
    """The steps of one reply to `prompt_ids`. `stats` and `finish_reason` are current at any time.

    The longest prefix of the prompt that `cache` already holds is not computed again. `progress` is called with (tokens
    done, tokens to do) while the prompt is read, `cancelled` between the steps of the model; `adapters` are those of
    `Model.forward`, for prompt and reply; `breakers` are the params' dry_sequence_breakers as tokens.
    finish_reason: None while it runs; "stop" (an end token), "length" (max_new_tokens), "context" (the cache is full),
    "cancelled" (asked to, or closed early). The end token itself is not a step; `end_token_id` names it.

    Raises:
        RequestError: the prompt is empty, holds ids that the model does not know, or does not fit into the cache.
    """

    def __init__(
        self,
        model: ModelLike,
        cache: CacheLike,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        end_token_ids: Sequence[int] = (),
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        adapters: Request | None = None,
        breakers: Breakers | None = None,
    ) -> None:
        self.finish_reason: str | None = None
        self.end_token_id: int | None = None
        self._model, self._cache, self._params = model, cache, params
        self._prompt_ids = checked_prompt(model, cache.capacity, prompt_ids)
        self._adapters, self._breakers = adapters, breakers
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(end_token_ids))
        self._cancelled, self._progress = cancelled or (lambda: False), progress
        self._reused = self._new_tokens = self._context_used = 0
        self._prompt_s = self._generation_s = 0.0
        self._steps = self._run()

    def __next__(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """End early. The cache keeps what was computed and can be used further."""
        self._steps.close()
        self.finish_reason = self.finish_reason or "cancelled"

    @property
    def stats(self) -> GenerationStats:
        """What has been done so far."""
        return GenerationStats(
            prompt_tokens=len(self._prompt_ids),
            reused_tokens=self._reused,
            prompt_s=self._prompt_s,
            new_tokens=self._new_tokens,
            generation_s=self._generation_s,
            context_used=self._context_used,
            context_size=self._cache.capacity,
        )

    def _run(self) -> Iterator[Step]:
        params = self._params
        logits = self._read_prompt()
        if logits is None:
            return
        sampler = Sampler(params, self._prompt_ids, self._breakers)
        while True:
            started = time.perf_counter()
            token_id = sampler.choose(logits[-1])
            self._new_tokens += 1
            step = self._step(token_id, logits[-1])
            self._generation_s += time.perf_counter() - started
            if token_id in self._ends:
                self.finish_reason, self.end_token_id = "stop", token_id
                return
            yield step
            self.finish_reason = self._reason_to_end()
            if self.finish_reason is not None:
                return
            started = time.perf_counter()
            logits = self._model.forward(
                [token_id], self._cache, logits="last", cancelled=self._cancelled, adapters=self._adapters
            )
            self._generation_s += time.perf_counter() - started
            self._context_used = self._cache.length
            if logits is None:
                self.finish_reason = "cancelled"
                return

    def _read_prompt(self) -> torch.Tensor | None:
        """Logits after the prompt, [1, V]; None when there is nothing to choose."""
        if self._cancelled():
            self.finish_reason = "cancelled"
            return None
        started = time.perf_counter()
        self._reused = self._model.reusable_prefix(self._cache, self._prompt_ids, self._adapters)
        self._cache.truncate(self._reused)
        wanted = "last" if self._params.max_new_tokens != 0 else "none"
        rest = self._prompt_ids[self._reused :]
        logits = self._model.forward(
            rest,
            self._cache,
            logits=wanted,
            progress=self._progress,
            cancelled=self._cancelled,
            adapters=self._adapters,
        )
        self._prompt_s = time.perf_counter() - started
        self._context_used = self._cache.length
        if logits is None:
            self.finish_reason = "length" if self._cache.length == len(self._prompt_ids) else "cancelled"
        return logits

    def _reason_to_end(self) -> str | None:
        if self._params.max_new_tokens is not None and self._new_tokens >= self._params.max_new_tokens:
            return "length"
        if self._cache.length >= self._cache.capacity:
            return "context"
        return "cancelled" if self._cancelled() else None

    def _step(self, token_id: int, logits: torch.Tensor) -> Step:
        if self._params.logprobs is None:
            return Step(token_id)
        return Step(token_id, *top_logprobs(logits, token_id, self._params.logprobs))


def checked_prompt(model: ModelLike, capacity: int, prompt_ids: Sequence[int]) -> list[int]:
    """The prompt as a list of ids that the model knows and the context can hold.

    Raises:
        RequestError: empty, ids of a wrong type or out of range. ContextLengthError: too long.
    """
    if isinstance(prompt_ids, (list, tuple, range)) and len(prompt_ids) > capacity:  # before looking at each of them
        raise ContextLengthError.of(len(prompt_ids), capacity)
    ids = checked_token_ids(prompt_ids, model.config.vocab_size)
    if len(ids) > capacity:
        raise ContextLengthError.of(len(ids), capacity)
    return ids
