"""Questions about documents of given lengths, from the sides that training never sees: what the evaluations ask.

A trial is one document and questions that are each asked of it alone, so the document is read once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from reading import documents, exercises
from reading.documents import Document, HeldOut
from reading.exercises import ASSISTANT, BEGIN, END, USER, Question
from reading.vocabulary import Encoder

SIDES = {
    "names": HeldOut(names=True),
    "wordings": HeldOut(names=True, wordings=True),
    "types": HeldOut(names=True, types=True),
    "all": HeldOut(names=True, wordings=True, types=True),
}
# What the question and the longest answer take beside the document.
RESERVE = 72
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


def document_trial(rng: random.Random, encoder: Encoder, length: int, side: HeldOut, num_questions: int = 8) -> Trial:
    """A document as long as fits into `length` tokens with a question, and questions from everywhere within it."""
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
    context = [BEGIN, USER, f"{document.text}\n\n"]
    asked = [_asked(encoder, question, depth, document.type) for question, depth in chosen]
    return Trial(tuple(encoder.encode("".join(context))), tuple(asked))


def pass_key_trial(rng: random.Random, encoder: Encoder, length: int, depth: float) -> Trial:
    """A number hidden at `depth` (0: the beginning) of sentences that say nothing, `length` tokens in all."""
    low, high = 1, length
    seed = rng.random()
    while low < high:  # the most sentences that fit; the same random choices each time
        middle = (low + high + 1) // 2
        text, _ = exercises.pass_key(random.Random(seed), middle, depth)
        low, high = (middle, high) if len(encoder.encode(text)) <= length - RESERVE // 2 else (low, middle - 1)
    text, questions = exercises.pass_key(random.Random(seed), low, depth)
    context = tuple(encoder.encode(f"{BEGIN}{USER}{text}\n\n"))
    return Trial(context, (_asked(encoder, questions[0], depth, "pass key"),))


def key_value_trial(rng: random.Random, encoder: Encoder, length: int, num_questions: int = 8) -> Trial:
    """A list of names and values as long as fits, and questions for some of them."""
    num_pairs = 2
    while True:
        seed = rng.random()
        text, questions = exercises.key_values(random.Random(seed), num_pairs, SIDES["names"])
        tokens = len(encoder.encode(text))
        if tokens > length - RESERVE // 2:
            num_pairs -= 1
            continue
        grown = num_pairs * (length - RESERVE // 2) // (tokens + 16)
        if grown <= num_pairs:
            break
        num_pairs = grown
    context = tuple(encoder.encode(f"{BEGIN}{USER}{text}\n\n"))
    asked = [_asked(encoder, question, 0.5, "key value") for question in questions[:num_questions]]
    return Trial(context, tuple(asked))


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


def _asked(encoder: Encoder, question: Question, depth: float, document_type: str) -> Asked:
    ids = encoder.encode(f"{question.text}{ASSISTANT}")
    return Asked(tuple(ids), tuple(encoder.encode(f" {question.answer}{END}")), question.kind, depth, document_type)
