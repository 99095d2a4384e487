"""What is hidden in a text, and how it is asked for: pass keys, several of them at once, and pairs of a JSON object.

    keys     filler ... The pass key is 71432. ... filler   The pass key is                 -> 71432
    several  filler ... hemp: 71432 ... jute: 20119 ...     The pass key of jute is         -> 20119
    pairs    {"1f2e-...": "77ab-...", ...}                  The value of "1f2e-..." is "    -> 77ab-...

`keys` is the passkey test of Mohtashami and Jaggi 2023 (arXiv:2305.16300). In `several` there is a key at every depth,
and each is asked for by its name, so that finding any key is not enough. `pairs` fills the whole context with keys and
values that mean nothing, as Liu et al. 2023 ("Lost in the Middle", arXiv:2307.03172) do.

A task makes the trials of one length: token ids of a context, and questions about it. All are drawn from a seed by the
length and the number of the trial, so that a trial is the same whatever else is asked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ropewalk.base.choices import Choice
from ropewalk.base.errors import RequestError
from ropewalk.text.tokenizer.load import Tokenizer

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nThe pass key is "
NAMED_NEEDLE = "\nThe pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.\n"
NAMED_QUESTION = "\nThe pass key of {name} is "
NAMES = tuple(
    [
        "hemp",
        "jute",
        "flax",
        "sisal",
        "cotton",
        "manila",
        "coir",
        "silk",
        "nylon",
        "wool",
        "linen",
        "ramie",
        "kapok",
        "bast",
        "abaca",
        "tow",
    ]
)
KEY_DIGITS = 5
FIRST_PAIR, NEXT_PAIR, LAST_PAIR = '\n{{"{key}": "{value}"', ',\n "{key}": "{value}"', "}\n"
PAIR_QUESTION = '\nThe value of "{key}" is "'
PARTS_OF_A_NAME = (8, 4, 4, 4, 12)  # hexadecimal digits, as UUIDs are written

TASKS = Choice(
    "task",
    {
        "keys": "one pass key",
        "several": "a pass key at every depth, told apart by names",
        "pairs": "values of a JSON object that fills the context",
    },
    "keys",
)


@dataclass(frozen=True, slots=True)
class Question:
    """What follows the context, and what is to be said then. depth: where that stands, 0 (the start) to 1."""

    depth: float
    ids: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """A context and the questions about it; the context, any one question and its answer have the length together."""

    name: str
    context: tuple[int, ...]
    questions: tuple[Question, ...]


class Task(Protocol):
    """Makes trials. facts: what they depend on, besides the text and what `trials` is given."""

    @property
    def facts(self) -> dict[str, object]: ...
    def least(self, depths: Sequence[float]) -> int:
        """The shortest context in which the questions make sense."""

    def trials(self, length: int, depths: Sequence[float]) -> list[Trial]:
        """All trials of a length, in an order in which neighbours begin alike."""


def check_tasks(kinds: Sequence[str]) -> None:
    """Raises:
    RequestError: one of them is unknown.
    """
    for kind in kinds:
        if kind not in TASKS.values:
            raise RequestError(f"task must be one of {', '.join(TASKS.values)}, got {kind!r:.60}")


def make_task(kind: str, tokenizer: Tokenizer, filler: Sequence[int], trials: int, seed: int = 0) -> Task:
    """One of TASKS. filler: token ids of a text, used from its start and repeated if it is short.

    Raises:
        RequestError: an unknown kind, no filler, or no trials.
    """
    check_tasks([kind])
    if not len(filler):
        raise RequestError("retrieval needs a filler text, and there is none")
    if trials < 1:
        raise RequestError(f"retrieval needs at least one trial, got {trials}")
    return {"keys": PassKeys, "several": SeveralKeys, "pairs": Pairs}[kind](tokenizer, list(filler), trials, seed)


class _Drawn:
    """What the tasks have in common."""

    kind = ""

    def __init__(self, tokenizer: Tokenizer, filler: Sequence[int], trials: int, seed: int) -> None:
        self._tokenizer, self._filler = tokenizer, list(filler)
        self._num_trials, self._seed = trials, seed

    @property
    def facts(self) -> dict[str, object]:
        """The kind, the number of trials and the seed."""
        return {"task": self.kind, "trials": self._num_trials, "seed": self._seed}

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_bos=False))

    def _asked(self, depth: float, question: str, answer: str) -> Question:
        """The tokens of the answer are those after the question, whose last word a tokenizer may join with it."""
        alone, whole = self._ids(question), self._ids(question + answer)
        common = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        return Question(depth, whole[:common], whole[common:])

    def _padded(self, questions: Sequence[Question], size: int) -> tuple[Question, ...]:
        """Each with as much filler before it as makes it and its answer `size` tokens."""
        return tuple(Question(q.depth, (*self._text(size - _size(q)), *q.ids), q.answer) for q in questions)

    def _draw(self, *of: object) -> random.Random:
        return random.Random(" ".join(map(str, (self._seed, self.kind, *of))))

    def _text(self, num_tokens: int) -> list[int]:
        rounds = -(-num_tokens // len(self._filler))
        return (self._filler * rounds)[: max(0, num_tokens)]


def _key(draw: random.Random) -> str:
    return "".join(draw.choices("0123456789", k=KEY_DIGITS))


class PassKeys(_Drawn):
    """One key in a text; a context for every depth. The keys are the same at every length and depth."""

    kind = "keys"

    def least(self, depths: Sequence[float]) -> int:
        """As `Task.least`."""
        return 1 + max(len(needle) + _size(asked) for needle, asked in map(self._probe, range(self._num_trials)))

    def trials(self, length: int, depths: Sequence[float]) -> list[Trial]:
        """As `Task.trials`."""
        return [self._trial(length, depth, number) for depth in depths for number in range(self._num_trials)]

    def _probe(self, number: int) -> tuple[tuple[int, ...], Question]:
        key = _key(self._draw(number))
        return self._ids(NEEDLE.format(key=key)), self._asked(0.0, QUESTION, key)

    def _trial(self, length: int, depth: float, number: int) -> Trial:
        needle, asked = self._probe(number)
        text = self._text(length - len(needle) - _size(asked))
        place = round(depth * len(text))
        context = (*text[:place], *needle, *text[place:])
        return Trial(f"{depth:g} {number}", context, (Question(depth, asked.ids, asked.answer),))


class SeveralKeys(_Drawn):
    """A key at every depth, each with a name; all of them are asked for."""

    kind = "several"

    def least(self, depths: Sequence[float]) -> int:
        """As `Task.least`."""
        return 1 + max(
            sum(map(len, needles)) + max(map(_size, asked))
            for needles, asked in (self._probes(depths, number) for number in range(self._num_trials))
        )

    def trials(self, length: int, depths: Sequence[float]) -> list[Trial]:
        """As `Task.trials`."""
        return [self._trial(length, sorted(depths), number) for number in range(self._num_trials)]

    def _probes(self, depths: Sequence[float], number: int) -> tuple[list[tuple[int, ...]], list[Question]]:
        if len(depths) > len(NAMES):
            raise RequestError(f"at most {len(NAMES)} keys can be told apart by names, got {len(depths)} depths")
        draw = self._draw(number)
        names = draw.sample(NAMES, len(depths))
        keys = [_key(draw) for _ in names]
        needles = [self._ids(NAMED_NEEDLE.format(name=name, key=key)) for name, key in zip(names, keys, strict=True)]
        asked = [
            self._asked(depth, NAMED_QUESTION.format(name=name), key)
            for depth, name, key in zip(depths, names, keys, strict=True)
        ]
        return needles, asked

    def _trial(self, length: int, depths: Sequence[float], number: int) -> Trial:
        needles, questions = self._probes(depths, number)
        text = self._text(length - sum(map(len, needles)) - max(map(_size, questions)))
        places = [round(depth * len(text)) for depth in depths]
        context: list[int] = []
        for start, end, needle in zip([0, *places], places, needles, strict=False):
            context += [*text[start:end], *needle]
        context += text[places[-1] :]
        return Trial(f"{number}", tuple(context), self._padded(questions, length - len(context)))


class Pairs(_Drawn):
    """A JSON object of as many pairs as fit; those at the depths are asked for. What is left over is filler."""

    kind = "pairs"

    def least(self, depths: Sequence[float]) -> int:
        """As `Task.least`: one pair, its question, and its answer, of numbers that may need more tokens than others."""
        pair = {"key": _name(self._draw("size")), "value": _name(self._draw("size", 2))}
        text = FIRST_PAIR.format(**pair) + LAST_PAIR + PAIR_QUESTION.format(**pair) + pair["value"]
        return len(self._ids(text)) * 5 // 4

    def trials(self, length: int, depths: Sequence[float]) -> list[Trial]:
        """As `Task.trials`."""
        return [self._trial(length, depths, number) for number in range(self._num_trials)]

    def _trial(self, length: int, depths: Sequence[float], number: int) -> Trial:
        draw = self._draw(length, number)
        pairs: list[tuple[str, str]] = []
        pieces: list[tuple[int, ...]] = []
        end = self._ids(LAST_PAIR)
        used = len(end)
        longest = 0  # question and answer
        while True:
            key, value = _name(draw), _name(draw)
            piece = self._ids((NEXT_PAIR if pairs else FIRST_PAIR).format(key=key, value=value))
            size = max(longest, _size(self._asked(0.0, PAIR_QUESTION.format(key=key), value)))
            if used + len(piece) + size > length:
                break
            pairs.append((key, value))
            pieces.append(piece)
            used, longest = used + len(piece), size
        if not pairs:
            raise RequestError(f"{length} tokens are too few for a pair and the question about it")
        questions = []
        for depth in depths:
            key, value = pairs[round(depth * (len(pairs) - 1))]
            questions.append(self._asked(depth, PAIR_QUESTION.format(key=key), value))
        longest = max(map(_size, questions))
        context = (*self._text(length - used - longest), *(token for piece in pieces for token in piece), *end)
        return Trial(f"{number}", context, self._padded(questions, length - len(context)))


def _name(draw: random.Random) -> str:
    return "-".join("".join(draw.choices("0123456789abcdef", k=size)) for size in PARTS_OF_A_NAME)


def _size(asked: Question) -> int:
    return len(asked.ids) + len(asked.answer)
