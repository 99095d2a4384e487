"""DRY ("don't repeat yourself"): a penalty against going on with a text as it went on before.

Where m is the length of the longest copy, among earlier tokens, of the last m tokens, the token t that followed it gets

    logit[t] -= multiplier * base ** (m - allowed_length)        if m >= allowed_length

so the penalty grows with every token that is repeated, and short ones cost nothing. A copy does not reach across a
sequence breaker (such as a line's end), nor before the last `range` tokens, and a breaker itself is never penalised.

Source: p-e-w 2024, github.com/oobabooga/text-generation-webui/pull/5677, which looks at 50 tokens of a copy at most.
Here, as in github.com/ggml-org/llama.cpp/pull/9702, a copy may be of any length, any token that contains the text of a
breaker is one, and a breaker may be written in several tokens. Penalties are float64 until they are taken from the
float32 logits, and at most `MAX_PENALTY`, so that logits stay finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from ropewalk.base.unthreaded import copied

MAX_PENALTY = 1e30
LOOK_BACK = 64  # tokens in which a breaker that ends now must have begun


class Breakers(Protocol):
    """What ends a repetition, in token ids; whoever knows the tokens' texts provides it."""

    def is_breaker(self, token_id: int) -> bool:
        """Whether this token alone is one."""

    def end_in_last(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of these tokens ends one."""


class NoBreakers:
    """Nothing ends a repetition."""

    def is_breaker(self, token_id: int) -> bool:
        """False."""
        return False

    def end_in_last(self, token_ids: Sequence[int]) -> bool:
        """False."""
        return False


class DryPenalty:
    """The penalty for one text, which grows token by token. A token costs a few passes over an array, not a search.

    span: how many of the last tokens are looked at (None: all).
    """

    def __init__(
        self,
        multiplier: float,
        base: float,
        allowed_length: int,
        span: int | None,
        breakers: Breakers,
        token_ids: Sequence[int],
    ) -> None:
        self._multiplier, self._base, self._allowed_length = multiplier, base, allowed_length
        self._span, self._breakers = span, breakers
        seen = list(token_ids) if span is None else list(token_ids)[-span:]
        self._ids = np.array(seen, dtype=np.int64)  # [n]
        self._lengths = common_endings(seen)  # [n - 1]
        self._since_breaker = _tokens_since_breaker(seen, breakers)

    def append(self, token_id: int) -> None:
        """The text goes on with this token."""
        # An earlier place that ends with the new token repeats one token more than the place before it did.
        longer = np.concatenate((np.zeros(1, np.int64), self._lengths[: max(len(self._ids) - 1, 0)])) + 1
        self._lengths = np.where(self._ids == token_id, longer[: len(self._ids)], 0)
        self._ids = np.append(self._ids, token_id)
        if self._span is not None:
            self._ids = self._ids[-self._span :]
            self._lengths = self._lengths[len(self._lengths) - len(self._ids) + 1 :]
        ended = self._breakers.end_in_last(self._ids[-LOOK_BACK:].tolist())
        self._since_breaker = 0 if ended else self._since_breaker + 1

    def penalties(self) -> dict[int, float]:
        """What to take from the logit of which token."""
        if self._since_breaker < self._allowed_length:
            return {}
        # No copy is longer than what there is before it, or since the last breaker.
        within = np.minimum(np.arange(1, len(self._lengths) + 1), self._since_breaker)
        lengths = np.minimum(self._lengths, within)
        places = np.flatnonzero(lengths >= self._allowed_length)
        token_ids, group = np.unique(self._ids[places + 1], return_inverse=True)
        longest = np.zeros(len(token_ids), dtype=np.int64)
        np.maximum.at(longest, group, lengths[places])
        with np.errstate(over="ignore"):
            amounts = self._multiplier * np.power(self._base, (longest - self._allowed_length).astype(np.float64))
        amounts = np.minimum(amounts, MAX_PENALTY)
        pairs = zip(token_ids.tolist(), amounts.tolist(), strict=True)
        return {token_id: amount for token_id, amount in pairs if not self._breakers.is_breaker(token_id)}


def penalise_repeats(logits: torch.Tensor, penalties: dict[int, float]) -> torch.Tensor:
    """logits [V] minus the penalty of each token that has one."""
    ids = torch.tensor(list(penalties), dtype=torch.int64)
    return copied(logits).index_add_(0, ids, -torch.tensor(list(penalties.values()), dtype=logits.dtype))


def common_endings(token_ids: Sequence[int]) -> np.ndarray:
    """[n - 1] int64: for each token but the last, how many tokens up to it equal as many at the end of the text.

    This is the Z-function of the reversed text (Gusfield 1997, section 1.4): 2n comparisons at most.
    """
    reverse = list(token_ids)[::-1]
    size = len(reverse)
    found = [0] * size
    start = end = 0  # the piece [start, end) of what was compared that equals the beginning, and reaches furthest
    for place in range(1, size):
        length = min(end - place, found[place - start]) if place < end else 0
        while place + length < size and reverse[length] == reverse[place + length]:
            length += 1
        found[place] = length
        if place + length > end:
            start, end = place, place + length
    return np.array(found[1:][::-1], dtype=np.int64)


def _tokens_since_breaker(token_ids: Sequence[int], breakers: Breakers) -> int:
    for count in range(len(token_ids)):
        end = len(token_ids) - count
        if breakers.end_in_last(token_ids[max(0, end - LOOK_BACK) : end]):
            return count
    return len(token_ids)
