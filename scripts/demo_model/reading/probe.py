"""Exact answers on texts that training never sees, by teacher forcing: quick enough to be asked every few minutes."""

from __future__ import annotations

import random

import torch

from reading import documents, exercises
from reading.documents import TRAINING, HeldOut
from reading.network import Network
from reading.vocabulary import Encoder

SIDES = {
    "seen": TRAINING,
    "names": HeldOut(names=True),
    "all": HeldOut(names=True, wordings=True, types=True),
}
NUM_DOCUMENTS, NUM_FACTS = 10, 6


@torch.no_grad()
def probe(network: Network, encoder: Encoder) -> dict[str, float]:
    """Share of exact answers by side (see SIDES), for documents of six facts, of key-value lists and absent facts."""
    results: dict[str, list[bool]] = {f"exact_{side}": [] for side in SIDES}
    results |= {"exact_absent": [], "exact_quote": [], "exact_keys": [], "exact_long": []}
    for side, held_out in SIDES.items():
        rng = random.Random(f"probe {side}")
        for _ in range(NUM_DOCUMENTS):
            document = documents.make_document(rng, NUM_FACTS, held_out)
            questions = exercises.questions_about(rng, document, held_out, absent=0.2, quotes=0.2)
            _score(network, encoder, rng, document.text, questions, results, f"exact_{side}")
    rng = random.Random("probe keys")
    for _ in range(NUM_DOCUMENTS):
        text, questions = exercises.key_values(rng, 6, SIDES["names"])
        _score(network, encoder, rng, text, questions, results, "exact_keys")
    rng = random.Random("probe long")
    for _ in range(6):
        document = documents.make_document(rng, 24, SIDES["names"])
        questions = exercises.questions_about(rng, document, SIDES["names"], absent=0.0, quotes=0.0)[:5]
        _score(network, encoder, rng, document.text, questions, results, "exact_long")
    return {name: round(sum(hits) / max(len(hits), 1), 3) for name, hits in results.items()}


def _score(network, encoder: Encoder, rng, text: str, questions, results: dict[str, list[bool]], name: str) -> None:
    pieces = exercises.conversation(rng, text, questions)
    for question, hit in zip(questions, exact_answers(network, encoder, pieces), strict=False):
        special = {"absent": "exact_absent", "quote": "exact_quote", "both": "exact_quote"}.get(question.kind)
        results[special or name].append(hit)


@torch.no_grad()
def exact_answers(network: Network, encoder: Encoder, pieces: list[exercises.Piece]) -> list[bool]:
    """For each answer of a conversation (that fits in the context) whether every token of it is the likeliest."""
    ids, spans = [], []
    for text, is_answer in pieces:
        new = encoder.encode(text)
        if is_answer:
            spans.append((len(ids), len(ids) + len(new)))
        ids += new
    ids = ids[: network.shape.context]
    with torch.autocast("cpu", torch.bfloat16):
        predicted = network.logits(network(torch.tensor([ids[:-1]]))[0]).argmax(-1)
    right = predicted == torch.tensor(ids[1:])
    return [bool(right[start - 1 : end - 1].all()) for start, end in spans if end <= len(ids)]
