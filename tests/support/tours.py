"""A small tour of the embedded model: what it answers is whatever it says, so that both outcomes can be arranged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ropewalk.files.embedded import demo_model_path
from ropewalk.tour.tour import Measured, Question, Tour, write_tour

ADAPTER = "linear-4"
SCALING = {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 512}
SENTENCES = tuple(f"The walk of house {number} is {number + 100} fathoms long." for number in range(60))
HOUSES = (7, 31, 55)


def small_tour(**changes: Any) -> Tour:
    """About 1,000 tokens, three of whose sentences are asked about."""
    questions = tuple(
        Question(f"How long is the walk of house {n}?", f"{n + 100} fathoms", SENTENCES[n], "value") for n in HOUSES
    )
    values = {
        "title": "Ropewalks",
        "document": " ".join(SENTENCES),
        "questions": questions,
        "scaling": SCALING,
        "adapter": ADAPTER,
        "measured": Measured(tokens=1000, documents=4, questions=32, right_scaled=20, right_plain=3),
    }
    return Tour(**values | changes)


def model_with_a_tour(folder: Path, tour: Tour | None = None) -> Path:
    """A copy of the embedded model that brings this tour and nothing else of the kind."""
    shutil.copytree(demo_model_path(), folder, ignore=shutil.ignore_patterns("tour"))
    write_tour(small_tour() if tour is None else tour, folder)
    return folder
