"""What the model sees when: rows of exercises that fill their window, from copying to documents of 512 tokens.

A batch is a function of the seed and the step, so a run that is stopped and resumed sees what it would have seen.
Short windows come first: looking back is learned from short rows ten times as fast, and long rows cost more each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from reading import exercises, relations
from reading.exercises import Piece
from reading.vocabulary import Encoder

REST_WEIGHT, LIBRARY_WEIGHT = 0.1, 0.25  # beside 1 of an answer
# Of tokens that are no answers, one in this many is predicted, with a weight that makes up for the others.
REST_ONE_IN = 6


@dataclass(frozen=True, slots=True)
class Phase:
    """Up to `until` tokens in all: rows of `length` tokens, `rows` a step, drawn from `mix` (maker name -> share)."""

    until: float
    length: int
    rows: int
    mix: tuple[tuple[str, float], ...]
    facts: tuple[int, int] = (2, 4)
    absent: float = 0.0
    quotes: float = 0.0


PHASES = (
    Phase(0.6e6, 64, 64, (("copying", 0.6), ("keys", 0.4))),
    Phase(2.0e6, 128, 32, (("copying", 0.1), ("keys", 0.35), ("facts", 0.55)), (2, 3)),
    Phase(5.0e6, 128, 64, (("keys", 0.15), ("facts", 0.82), ("library", 0.03)), (2, 5), 0.05, 0.05),
    Phase(14.0e6, 256, 16, (("keys", 0.1), ("pass key", 0.03), ("facts", 0.8), ("library", 0.07)), (3, 10), 0.12, 0.1),
    Phase(
        1e12,
        512,
        8,
        (("keys", 0.08), ("pass key", 0.04), ("hidden", 0.05), ("facts", 0.73), ("library", 0.1)),
        (4, 26),
        0.15,
        0.4,
    ),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """ids: [rows, length + 1] int64. For each target, which is the id that follows:

    weights: [rows, length] float32 — what its loss counts; 0: not looked at. is_answer: [rows, length] bool.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    is_answer: torch.Tensor

    def parts(self, count: int) -> list[Batch]:
        """The rows in `count` parts (or fewer)."""
        columns = (
            tensor.tensor_split(min(count, len(self.ids))) for tensor in (self.ids, self.weights, self.is_answer)
        )
        return [Batch(*part) for part in zip(*columns, strict=True)]


def phase_at(tokens: int, phases: Sequence[Phase] = PHASES) -> Phase:
    """The phase after `tokens` tokens."""
    return next(phase for phase in phases if tokens < phase.until)


def make_batch(phase: Phase, encoder: Encoder, library: np.ndarray, seed: int, step: int) -> Batch:
    """The batch of a step. library: [tokens] uint16, the encoded documents of the standard library."""
    rng = random.Random(f"{seed}:{step}")
    size = phase.length + 1
    ids = np.zeros((phase.rows, size), dtype=np.int64)
    weights = np.zeros((phase.rows, size), dtype=np.float32)
    answers = np.zeros((phase.rows, size), dtype=np.float32)
    for row in range(phase.rows):
        kind = rng.choices([k for k, _ in phase.mix], [w for _, w in phase.mix])[0]
        if kind == "library":
            ids[row], weights[row] = _library_piece(rng, library, size), LIBRARY_WEIGHT
            continue
        if kind == "hidden":
            ids[row], answers[row] = _hidden(rng, encoder, library, size)
        else:
            ids[row], answers[row] = _filled(lambda kind=kind: MAKERS[kind](rng, phase), encoder, size)
        sampled = np.asarray([rng.randrange(REST_ONE_IN) == 0 for _ in range(size)])
        weights[row] = np.where(answers[row], answers[row], sampled * (REST_WEIGHT * REST_ONE_IN))
    return Batch(torch.from_numpy(ids), torch.from_numpy(weights[:, 1:]), torch.from_numpy(answers[:, 1:] > 0))


def _filled(make: Callable[[], list[Piece]], encoder: Encoder, size: int) -> tuple[list[int], list[float]]:
    """Exercises one after the other, cut at `size` tokens."""
    ids: list[int] = []
    answers: list[float] = []
    while len(ids) < size:
        new_ids, new_answers = encoder.pieces(make())
        ids += new_ids
        answers += new_answers
    return ids[:size], answers[:size]


def _library_piece(rng: random.Random, library: np.ndarray, size: int) -> list[int]:
    start = rng.randrange(len(library) - size)
    return library[start : start + size].tolist()


def _hidden(rng: random.Random, encoder: Encoder, library: np.ndarray, size: int) -> tuple[list[int], list[float]]:
    """A pass key somewhere in the library's text, and its repetition at the end: as `ropewalk retrieval` asks."""
    key = relations.value(rng, "code", False)
    needle = encoder.encode(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
    end = encoder.encode(f"\nThe pass key is {key}")
    text = _library_piece(rng, library, size - len(needle) - len(end))
    place = rng.choice((0, len(text), *[rng.randint(0, len(text)) for _ in range(8)]))
    ids = [*text[:place], *needle, *text[place:], *end]
    return ids, [float(number >= size - len(key)) for number in range(size)]


def _copying(rng: random.Random, phase: Phase) -> list[Piece]:
    return exercises.copying(rng, rng.randint(3, max(3, phase.length // 12)))


def _keys(rng: random.Random, phase: Phase) -> list[Piece]:
    most = max(2, phase.length // 12)  # a name and a value take 9 tokens
    text, questions = exercises.key_values(rng, rng.randint(2, most))
    return exercises.conversation(rng, text, questions)


def _pass_key(rng: random.Random, phase: Phase) -> list[Piece]:
    text, questions = exercises.pass_key(rng, rng.randint(3, phase.length // 11))
    return exercises.conversation(rng, text, questions)


def _facts(rng: random.Random, phase: Phase) -> list[Piece]:
    few, many = phase.facts
    num_facts = rng.randint(few, many)
    rounds = 2 if num_facts * 3 < many else 1
    filler = rng.choice((0.0, 0.1, 0.3))
    return exercises.about_a_document(rng, num_facts, rounds, phase.absent, phase.quotes, filler)


MAKERS = {"copying": _copying, "keys": _keys, "pass key": _pass_key, "facts": _facts}
