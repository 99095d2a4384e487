"""A conversation with a model about a document that nobody has seen, as a person would have it: for the card."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import ropewalk
from reading import documents, exercises
from reading.trials import SIDES
from ropewalk.generate.sampling import SamplingParams

NUM_FACTS, NUM_QUESTIONS = 8, 6
SEED = "card"


def converse(folder: Path) -> dict[str, Any]:
    """The document, and each question with its right answer and what the model in `folder` writes.

    The first question that comes up is asked, whatever becomes of it; two of the facts are asked for that the document
    does not have. The model sees its own answers before the next question.
    """
    rng = random.Random(SEED)
    side = SIDES["names"]
    document = documents.make_document(rng, NUM_FACTS, side)
    facts = rng.sample(document.facts, NUM_QUESTIONS - 2)
    questions = [exercises.ask(rng, fact, document, side, quotes=0.2) for fact in facts]
    for place in (2, 5):
        questions.insert(place, exercises.ask_absent(rng, document, side))
    engine = ropewalk.Engine(ropewalk.load_model(folder), ropewalk.load_tokenizer(folder))
    greedy = SamplingParams(temperature=0.0, max_new_tokens=48)
    messages: list[dict[str, str]] = []
    asked = []
    for question in questions:
        content = question.text if messages else f"{document.text}\n\n{question.text}"
        messages.append({"role": "user", "content": content})
        written = "".join(engine.chat(messages, greedy)).strip()
        messages.append({"role": "assistant", "content": written})
        asked.append({"question": question.text, "right": question.answer, "written": written})
    return {"document": document.text, "asked": asked}
