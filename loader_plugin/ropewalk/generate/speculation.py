"""Guesses of the next tokens, which the model then checks as rows of one step.

    last token, guess, guess, guess -> one step -> logits after each -> choose row by row up to the first disagreement

A step reads all weights for one row as for four, so a right guess is a token for a fraction of its price. Results of a
row depend on no other row, so the text is the same with and without. A guesser serves one reply; pace.py says how
many guesses are worth their rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ropewalk.base.errors import ConfigError
from ropewalk.generate.sampling import first_of_highest

TOKEN_BITS = 32  # of a token id within the key of an n-gram
NONE = -1


class Guesser(Protocol):
    """Guesses how one sequence goes on. token_ids is always the whole of it, and only grows from call to call."""

    def read(self, token_ids: Sequence[int]) -> None:
        """Do now what the first guess after these tokens needs: for the prompt, whose time is not that of a step."""
        ...

    def guess(self, token_ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens, or none."""
        ...


class NgramGuesser:
    """Prompt lookup: the last tokens stood here before, and what followed them then is the guess.

    Of the last `most_places` places after the last `shortest` tokens, the one whose match reaches back furthest, up to
    `longest` tokens; of equals the most recent. A place near the end continues with the guess itself, so a loop goes on
    (LZ77's copy). Each token is looked at once: a dictionary has the newest place after every n-gram of `shortest`
    tokens, a list the place before each place. Both forget what is more than `window` to twice `window` tokens back.
    """

    def __init__(self, shortest: int = 3, longest: int = 24, most_places: int = 32, window: int = 1 << 15) -> None:
        self._shortest, self._longest, self._most_places, self._window = shortest, longest, most_places, window
        self._mask = (1 << TOKEN_BITS * shortest) - 1
        self._forget_all()

    def read(self, token_ids: Sequence[int]) -> None:
        """Enter the places up to the last token. The end of the sequence itself is not a place: nothing follows."""
        if len(token_ids) < self._end:
            self._forget_all()
        for place in range(self._end, len(token_ids)):
            if place >= self._shortest:
                self._before.append(self._newest.get(self._key, NONE))
                self._newest[self._key] = place
            else:
                self._before.append(NONE)
            self._key = (self._key << TOKEN_BITS | token_ids[place]) & self._mask
        self._end = len(token_ids)
        if len(self._before) > 2 * self._window:
            del self._before[: -self._window]
            self._first = self._end - self._window
            self._newest = {key: place for key, place in self._newest.items() if place >= self._first}

    def guess(self, token_ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens, or none: see `Guesser`."""
        self.read(token_ids)
        place = self._best_place(token_ids) if count > 0 else None
        if place is None:
            return []
        guess = list(token_ids[place : place + count])
        distance = len(token_ids) - place
        while len(guess) < count:
            guess.append(guess[-distance])
        return guess

    def _forget_all(self) -> None:
        self._key = 0  # of the n-gram that ends before self._end
        self._end = 0  # tokens read
        self._newest: dict[int, int] = {}
        self._first = 0  # the place of self._before[0]
        self._before = array("q")  # of each place: an earlier one after the same n-gram, or NONE

    def _best_place(self, token_ids: Sequence[int]) -> int | None:
        best, best_length = None, self._shortest - 1
        place = self._newest.get(self._key, NONE)
        for _ in range(self._most_places):
            if place < self._first or place == NONE:
                break
            length = self._match_length(token_ids, place)
            if length > best_length:
                best, best_length = place, length
            if length == self._longest:
                break
            place = self._before[place - self._first]
        return best

    def _match_length(self, token_ids: Sequence[int], place: int) -> int:
        """How many tokens before `place` are those at the end."""
        most = min(self._longest, place)
        length = 0
        while length < most and token_ids[place - 1 - length] == token_ids[-1 - length]:
            length += 1
        return length


class DraftSequence(Protocol):
    """One sequence of a smaller model, such as one that a scheduler has opened for the same prompt."""

    @property
    def length(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def truncate(self, length: int) -> None: ...
    def forward(self, token_ids: Sequence[int], logits: str = "last") -> torch.Tensor | None: ...


class DraftGuesser:
    """The most likely continuation by a smaller model of the same vocabulary, token by token.

    It keeps up with the sequence: guesses that came true stay computed, others are truncated. What `draft` holds at
    the start must be a beginning of the sequence. There are no guesses beyond the smaller model's context, nor after
    tokens that it has no row for.
    """

    def __init__(self, draft: DraftSequence) -> None:
        self._draft = draft
        self._held: list[int] = []  # the tokens that the draft sequence holds
        self._agreed = 0  # of them, those known to be the sequence's

    def read(self, token_ids: Sequence[int]) -> None:
        """Compute all but the last token, as far as the smaller model's context goes."""
        rows = self._missing(token_ids)[:-1]
        if rows and len(token_ids) <= self._draft.capacity and self._knows(rows):
            self._forward(rows, "none")

    def guess(self, token_ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens, or none: see `Guesser`."""
        count = min(count, self._draft.capacity - len(token_ids) + 1)  # the last guess is not forwarded
        guesses: list[int] = []
        rows = self._missing(token_ids) if count > 0 else []
        while rows and len(guesses) < count and self._knows(rows):
            logits = self._forward(rows, "last")  # [1, V]
            if logits is None:  # cancelled
                break
            rows = [first_of_highest(logits[-1].detach().to("cpu", torch.float32))]
            guesses += rows
        return guesses

    def _knows(self, rows: Sequence[int]) -> bool:
        return max(rows) < self._draft.vocab_size

    def _forward(self, rows: list[int], logits: str) -> torch.Tensor | None:
        out = self._draft.forward(rows, logits=logits)
        self._held += rows
        del self._held[self._draft.length :]  # what cancelling left out
        return out

    def _missing(self, token_ids: Sequence[int]) -> list[int]:
        """Forget what came otherwise; the tokens still to compute, at least the last one."""
        if not self._held:  # at the start it may hold a beginning of the prompt
            self._held = list(token_ids[: self._draft.length])
        most = min(len(self._held), len(token_ids) - 1)
        agreed = min(self._agreed, most)
        while agreed < most and self._held[agreed] == token_ids[agreed]:
            agreed += 1
        self._agreed = agreed
        self._draft.truncate(agreed)
        del self._held[agreed:]
        return list(token_ids[agreed:])


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What two models must have in common for one to guess for the other.

    source: the model's folder or name, for messages. size: rows of its embedding table. num_tokens: of its tokenizer,
    without added ones. special: the ids of special tokens, by the tokens' texts. samples: the bytes of some tokens.
    """

    source: str
    size: int
    num_tokens: int
    special: Mapping[str, int]
    samples: Mapping[int, bytes]


def check_same_vocabulary(target: Vocabulary, draft: Vocabulary) -> None:
    """Refuse a draft model that speaks of other tokens than the model that it is to guess for.

    Tables may differ in the rows that only pad them, as those of Qwen models do.

    Raises:
        ConfigError: the numbers of tokens differ, a token stands for other bytes, or a special token of one has another
            id, or none, in the other.
    """
    advice = "a draft model needs the same tokenizer as the model: choose a smaller model of the same family"
    ours, theirs = (min(each.size, each.num_tokens) for each in (target, draft))
    if ours != theirs:
        raise ConfigError(f"draft_model: {draft.source} knows {theirs} tokens, {target.source} knows {ours}; {advice}")
    for token_id in sorted(target.samples.keys() & draft.samples.keys()):
        if target.samples[token_id] != draft.samples[token_id]:
            raise ConfigError(
                f"draft_model: token {token_id} is {draft.samples[token_id]!r} in {draft.source} and "
                f"{target.samples[token_id]!r} in {target.source}; {advice}"
            )
    for token in sorted({*target.special, *draft.special}):
        ours, theirs = target.special.get(token), draft.special.get(token)
        if ours != theirs:
            raise ConfigError(
                f"draft_model: the special token {token!r} is {_shown(theirs)} in {draft.source} and {_shown(ours)} in "
                f"{target.source}; {advice}"
            )


def _shown(token_id: int | None) -> str:
    return "missing" if token_id is None else str(token_id)
