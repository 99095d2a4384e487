"""What a tour is, as MODEL/tour/tour.json holds it: a document, three questions about it, and how a model reads it.

    {"ropewalk": "tour", "version": 1, "title": ..., "document": ...,
     "questions": [{"text": ..., "answer": ..., "passage": ..., "kind": ...}, two more],
     "scaling": {"rope_type": ..., "factor": ...}, "adapter": "yarn-8",
     "measured": {"tokens": ..., "documents": ..., "questions": ..., "right_scaled": ..., "right_plain": ...}}

A passage is a sentence or line of the document, as it stands there. `adapter` names a folder in MODEL/adapters, and may
be left out. `measured` says how the tour was chosen: among how many documents, and how all their questions went.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ropewalk.adapters.config import CONFIG_NAME
from ropewalk.base.errors import ConfigError
from ropewalk.base.json import Section, read_json_object

FOLDER, FILE = "tour", "tour.json"
VERSION = 1
NUM_QUESTIONS = 3
MAX_DOCUMENT = 1 << 20  # characters: the page sends all of them to every visitor
MOST = 1 << 53  # of what is counted: as far as JSON numbers are exact


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its only right answer, and the passage of the document that says so. kind: of question, in a word."""

    text: str
    answer: str
    passage: str
    kind: str


@dataclass(frozen=True, slots=True)
class Measured:
    """tokens: of the document. documents, questions: that were tried until this one was chosen; right_scaled,
    right_plain: of all those questions, how many were answered right with the scaling and its adapter, and without."""

    tokens: int
    documents: int
    questions: int
    right_scaled: int
    right_plain: int


@dataclass(frozen=True, slots=True)
class Tour:
    """scaling: RoPE scaling, as `load_model` takes it; adapter: the name of a LoRA that comes with the model."""

    title: str
    document: str
    questions: tuple[Question, ...]
    scaling: Mapping[str, Any]
    adapter: str | None
    measured: Measured

    def question(self, text: str) -> Question | None:
        """The question of that text, if it is one of the tour's."""
        return next((question for question in self.questions if question.text == text), None)


def tour_file(model_folder: Path) -> Path:
    """Where the tour of a model is, if it has one."""
    return model_folder / FOLDER / FILE


def read_tour(model_folder: Path) -> Tour | None:
    """The tour that comes with a model; None if there is none.

    Raises:
        ConfigError: it is damaged, or does not fit the folder; the message names the file and the field.
    """
    path = tour_file(model_folder)
    if not path.exists():
        return None
    section = Section(str(path), read_json_object(path))
    if section.text("ropewalk") != "tour":
        raise section.error("ropewalk", '"tour"')
    section.integer("version", VERSION, VERSION)
    document = _text(section, "document")
    if len(document) > MAX_DOCUMENT:
        raise ConfigError(f"{path}: document has {len(document):,} characters, at most {MAX_DOCUMENT:,} are accepted")
    return Tour(
        _text(section, "title"),
        document,
        _questions(section, document),
        _required(section, "scaling").values,
        _adapter(section, model_folder),
        _measured(_required(section, "measured")),
    )


def write_tour(tour: Tour, model_folder: Path) -> Path:
    """Write the tour of a model, and return its file; what is written is read again as a check.

    Raises:
        ConfigError: as `read_tour`.
    """
    path = tour_file(model_folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"ropewalk": "tour", "version": VERSION, **asdict(tour)}
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    read_tour(model_folder)
    return path


def _questions(section: Section, document: str) -> tuple[Question, ...]:
    values = section.values.get("questions")
    if not isinstance(values, list) or len(values) != NUM_QUESTIONS or not all(isinstance(v, Mapping) for v in values):
        raise section.error("questions", f"a list of {NUM_QUESTIONS} objects")
    found = []
    for number, value in enumerate(values):
        one = Section(section.source, value, f"questions[{number}]")
        question = Question(*(_text(one, key) for key in ("text", "answer", "passage", "kind")))
        if question.passage not in document:
            raise one.error("passage", "a sentence of the document, as it stands there")
        if any(question.text == other.text for other in found):
            raise one.error("text", "a question that no other of the list is")
        found.append(question)
    return tuple(found)


def _adapter(section: Section, model_folder: Path) -> str | None:
    """A name, never a path: a folder that somebody dropped on the page must not lead out of itself."""
    name = section.text("adapter")
    if name is None:
        return None
    is_name = name not in ("", ".", "..") and not set(name) & set("/\\\0")
    if not is_name or not (adapter_folder(model_folder, name) / CONFIG_NAME).is_file():
        raise section.error("adapter", f"the name of a folder in {model_folder / 'adapters'} with {CONFIG_NAME}")
    return name


def adapter_folder(model_folder: Path, name: str) -> Path:
    """Where the adapter of that name is."""
    return model_folder / "adapters" / name


def _measured(section: Section) -> Measured:
    questions = section.integer("questions", NUM_QUESTIONS, MOST)
    return Measured(
        section.integer("tokens", 1, MOST),
        section.integer("documents", 1, MOST),
        questions,
        section.integer("right_scaled", 0, questions),
        section.integer("right_plain", 0, questions),
    )


def _required(section: Section, key: str) -> Section:
    found = section.section(key)
    if found is None:
        raise section.error(key, "an object")
    return found


def _text(section: Section, key: str) -> str:
    value = section.text(key)
    if value is None or not value.strip():
        raise section.error(key, "a text that is not empty")
    return value
