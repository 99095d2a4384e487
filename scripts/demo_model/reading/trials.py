"""Questions about documents of given lengths, from the sides that training never sees: what the evaluations ask.

A trial is one document and questions that are each asked of it alone, so the document is read once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from reading import documents, exercises
from reading.documents import Document, HeldOut
from reading.exercises import ASSISTANT, BEGIN, END, SYSTEM, USER, Question
from reading.vocabulary import Encoder

SIDES = {
    "names": HeldOut(names=True),
    "wordings": HeldOut(names=True, wordings=True),
    "types": HeldOut(names=True, types=True),
    "all": HeldOut(names=True, wordings=True, types=True),
}
# How a document and a question about it are put to the model: what stands before, between and after them.
FORMATS = {
    "plain": (USER, "\n\n", ASSISTANT),
    "system": (SYSTEM, USER, ASSISTANT),
    "closed": (
        f"{USER}BEGININPUT\nBEGINCONTEXT\nENDCONTEXT\n",
        "\nENDINPUT\nBEGININSTRUCTION\n",
        f"\nENDINSTRUCTION{ASSISTANT}",
    ),
}
# What the question, the longest answer and the format take beside a document; and beside a list or a pass key, whose
# answers are short.
RESERVE, SHORT_RESERVE = 88, 36
DEPTHS = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """One question: the ids after the document, those of its answer (with the end), and what it is, for the tables."""

    ids: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str
    depth: float
    type: str


@dataclass(frozen=True, slots=True)
class Trial:
    """context: the ids that all questions share."""

    context: tuple[int, ...]
    asked: tuple[Asked, ...]


def document_trial(
    rng: random.Random, encoder: Encoder, length: int, side: HeldOut, layout: str = "plain", num_questions: int = 8
) -> Trial:
    """A document as long as fits into `length` tokens with a question, and questions from everywhere within it.

    layout: one of FORMATS; the same documents and questions are drawn for each.
    """
    document = document_of(rng, encoder, length - RESERVE, side)
    chosen: list[tuple[Question, float]] = []
    facts = rng.sample(document.facts, min(num_questions, len(document.facts)))
    for fact in facts:
        kind = rng.random()
        if kind < 0.25:
            chosen.append((exercises.ask_absent(rng, document, side), 1.0))
        else:
            depth = document.text.index(fact.passage) / len(document.text)
            chosen.append((exercises.ask(rng, fact, document, side, quotes=0.15), depth))
    before, between, after = FORMATS[layout]
    context = encoder.encode(f"{BEGIN}{before}{document.text}{between}")
    asked = [_asked(encoder, question, depth, document.type, after) for question, depth in chosen]
    return Trial(tuple(context), tuple(asked))


def pass_key_trial(rng: random.Random, encoder: Encoder, length: int, depth: float) -> Trial:
    """A number hidden at `depth` (0: the beginning) of sentences that say nothing, `length` tokens in all."""
    seed = rng.random()
    num_sentences = _most(lambda count: exercises.pass_key(random.Random(seed), count, depth)[0], encoder, length)
    text, questions = exercises.pass_key(random.Random(seed), num_sentences, depth)
    context = tuple(encoder.encode(f"{BEGIN}{USER}{text}\n\n"))
    return Trial(context, (_asked(encoder, questions[0], depth, "pass key"),))


def key_value_trial(rng: random.Random, encoder: Encoder, length: int, num_questions: int = 8) -> Trial:
    """A list of names and values as long as fits, and questions for some of them."""
    seed, side = rng.random(), SIDES["names"]
    num_pairs = _most(lambda count: exercises.key_values(random.Random(seed), count, side)[0], encoder, length)
    text, questions = exercises.key_values(random.Random(seed), num_pairs, side)
    context = tuple(encoder.encode(f"{BEGIN}{USER}{text}\n\n"))
    asked = [_asked(encoder, question, 0.5, "key value") for question in questions[:num_questions]]
    return Trial(context, tuple(asked))


def _most(make: Callable[[int], str], encoder: Encoder, length: int) -> int:
    """The largest count whose text fits beside its question. make: the same random choices each time."""
    low, high = 1, length
    while low < high:
        middle = min((low + high + 1) // 2, 2 * low)
        fits = len(encoder.encode(make(middle))) <= length - SHORT_RESERVE
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def document_of(rng: random.Random, encoder: Encoder, tokens: int, side: HeldOut) -> Document:
    """The longest of a few documents that fit into `tokens`."""
    best: Document | None = None
    num_facts, best_tokens = max(1, tokens // 18), 0
    for _ in range(8):
        document = documents.make_document(rng, num_facts, side)
        size = len(encoder.encode(document.text))
        if size <= tokens and size > best_tokens:
            best, best_tokens = document, size
        num_facts = max(1, num_facts * tokens // (size + 20))
        if best_tokens > 0.9 * tokens:
            break
    assert best is not None, f"no document fits into {tokens} tokens"
    return best


def _asked(encoder: Encoder, question: Question, depth: float, document_type: str, after: str = ASSISTANT) -> Asked:
    ids = encoder.encode(f"{question.text}{after}")
    return Asked(tuple(ids), tuple(encoder.encode(f" {question.answer}{END}")), question.kind, depth, document_type)
