"""The tokenizer: sentencepiece BPE in which a syllable of an invented name is one piece and a digit another.

Half of what it learns from are exercises, so names that never occur twice still leave their syllables in it. There is
no dummy space before a text: a word is the same piece at every place but the start of a line.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece

from corpus import Document
from pieces import BOS_ID, EOS_ID, train_pieces
from reading import exercises, names
from reading.exercises import ASSISTANT, BEGIN, DELIMITERS, END, SYSTEM, USER, Piece

VOCAB_SIZE = 2048
NUM_EXERCISES = 12_000
SYLLABLE_COUNT = 10_000


def train_tokenizer(documents: Sequence[Document], num_exercises: int = NUM_EXERCISES) -> bytes:
    """A sentencepiece model proto, from exercises, syllables of names, and the library documents (one line in four)."""
    return train_pieces(
        _lines(documents, num_exercises),
        VOCAB_SIZE,
        add_dummy_prefix=False,
        control_symbols=[SYSTEM, USER, ASSISTANT],
        user_defined_symbols=list(DELIMITERS),
    )


def _lines(documents: Sequence[Document], num_exercises: int) -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(num_exercises):
        for text, _ in exercises.about_a_document(rng, rng.randint(2, 12)):
            for mark in (BEGIN, END, SYSTEM, USER, ASSISTANT):
                text = text.replace(mark, "\n")
            yield from (line for line in text.split("\n") if line)
    # Syllables alone and so often that their merges come before any across their borders ("Bran|dun", not "Br|and|un").
    yield from (f" {first}" * SYLLABLE_COUNT for first in names.FIRST_SYLLABLES)
    yield from (last for last in names.LAST_SYLLABLES + names.PLACE_ENDINGS for _ in range(SYLLABLE_COUNT))
    lines = (line for document in documents if not document.is_test for line in document.text.split("\n"))
    yield from (line for number, line in enumerate(lines) if number % 4 == 0)


class Encoder:
    """Text with special tokens written out, to ids, as the engine's tokenizer does it."""

    def __init__(self, proto: bytes) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.special = {mark: self.model.piece_to_id(mark) for mark in (BEGIN, END, SYSTEM, USER, ASSISTANT)}

    def pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[float]]:
        """Ids of an exercise, and the weight of each as part of an answer."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in pieces:
            new = self.encode(text)
            ids += new
            weights += [weight] * len(new)
        return ids, weights

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the marks of special tokens within it become those."""
        ids: list[int] = []
        while text:
            found = [(text.index(mark), mark) for mark in self.special if mark in text]
            if not found:
                return ids + self.model.encode(text)
            start, mark = min(found)
            if start:
                ids += self.model.encode(text[:start])
            ids.append(self.special[mark])
            text = text[start + len(mark) :]
        return ids

    def document(self, text: str) -> np.ndarray:
        """uint16 [tokens]: <s> text </s>."""
        return np.asarray([BOS_ID, *self.model.encode(text), EOS_ID], dtype=np.uint16)
