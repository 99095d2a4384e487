"""The tour of a model: a long document and three questions that it answers right with an adapter, and wrong without.

    python -m reading.tour MODEL_FOLDER --adapter yarn-8          # writes MODEL_FOLDER/tour/

(in scripts/demo_model). Documents of held-out names are generated from fixed seeds, and questions about each are asked
through the engine as the tour asks them. The document with the best three questions is taken; how many documents and
questions were tried, and how all of them went, is stored with it. Then curves and maps are measured (--skip-lab: not).
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import ropewalk
from reading import exercises
from reading.documents import Document, HeldOut
from reading.trials import document_of
from reading.vocabulary import Encoder
from ropewalk.adapters.config import read_lora_config
from ropewalk.base.errors import ConfigError
from ropewalk.measure.stored import store_curves, store_maps
from ropewalk.measure.tasks import make_task
from ropewalk.model.model import Model
from ropewalk.model.variants import Variant, adapter_variant, scaling_variant
from ropewalk.rope.rope import resolve_rope
from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer
from ropewalk.tour.explanation import scaling_name
from ropewalk.tour.readers import Readers, is_right, readers_for
from ropewalk.tour.tour import FOLDER, NUM_QUESTIONS, Measured, Question, Tour, adapter_folder, write_tour

SIDE = HeldOut(names=True)
PLEASANT = ("chronicle", "letter", "guide", "recipes", "ships")  # the others are lists, or have no beginning
QUOTES = 0.3  # share of questions that ask for the passage
PARTS = 3  # of the document: the three questions should be about all of them
TITLE = 60  # characters
LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CURVE_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Tried:
    """A question, where in the document its passage is (0 to 1), and whether each way to read answered it right."""

    question: Question
    depth: float
    scaled: bool
    plain: bool


def main() -> None:
    options = parse_options()
    logging.basicConfig(level=logging.WARNING)
    adapter = adapter_folder(options.model, options.adapter)
    scaling = read_lora_config(adapter).rope_scaling
    if scaling is None:
        raise ConfigError(f"{adapter} notes no rope_scaling: a tour needs an adapter that was trained under one")
    model = ropewalk.load_model(options.model, threads=options.threads)
    tokenizer = load_tokenizer(options.model)
    readers = readers_for(scaling, options.adapter, options.tokens, options.model, model, tokenizer)
    tried = search(readers, options)
    asked = [one for _, questions in tried for one in questions]
    counts = (len(tried), len(asked), sum(one.scaled for one in asked), sum(one.plain for one in asked))
    print("tried {} documents, {} questions: {} right with the scaling, {} without".format(*counts))
    found = [(document, chosen) for document, one in tried if (chosen := choose(one)) is not None]
    if not found:
        sys.exit(f"no document has {NUM_QUESTIONS} questions that go as they should: more --documents, fewer --tokens")
    document, chosen = max(found, key=lambda entry: score(entry[1]))
    tokens = len(tokenizer.encode(document.text, add_bos=False))
    questions = tuple(one.question for one in chosen)
    tour = Tour(title(document), document.text, questions, scaling, options.adapter, Measured(tokens, *counts))
    print(f"wrote {write_tour(tour, options.model)}: {tour.title!r}, {tokens} tokens")
    if not options.skip_lab:
        store_lab(options.model, adapter, model, tokenizer, options.trials)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder, with adapters/ and held_out.txt")
    parser.add_argument("--adapter", required=True, help="name of a folder in MODEL/adapters that notes its scaling")
    parser.add_argument("--tokens", type=int, default=3000, help="of the document, at most")
    parser.add_argument("--documents", type=int, default=16, help="to try")
    parser.add_argument("--questions", type=int, default=16, help="to ask about each")
    parser.add_argument("--trials", type=int, default=4, help="per cell of a map")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-lab", action="store_true", help="leave curves and maps out, which take minutes")
    return parser.parse_args()


def search(readers: Readers, options: argparse.Namespace) -> list[tuple[Document, list[Tried]]]:
    """All documents, each with its questions and how they went."""
    encoder = Encoder((options.model / "tokenizer.model").read_bytes())
    result = []
    for number in range(options.documents):
        rng = random.Random(f"tour {options.seed} {number}")
        document = pleasant_document(rng, encoder, options.tokens)
        result.append((document, ask_all(rng, readers, document, options.questions)))
        right = sum(one.scaled for one in result[-1][1]), sum(one.plain for one in result[-1][1])
        print(f"{number}: {title(document)!r}: {right[0]} right with the scaling, {right[1]} without", flush=True)
    return result


def pleasant_document(rng: random.Random, encoder: Encoder, tokens: int) -> Document:
    """A document to read from top to bottom, nearly as long as asked for."""
    while True:
        document = document_of(rng, encoder, tokens, SIDE)
        if document.type in PLEASANT:
            return document


def ask_all(rng: random.Random, readers: Readers, document: Document, num_questions: int) -> list[Tried]:
    """Questions about facts from everywhere in a document, asked in both ways; no two have the same text. They are of
    relations with wordings of their own: of the others, which join any two words, a reader would make no sense."""
    asked: dict[str, tuple[Question, float]] = {}
    facts = [fact for fact in document.facts if fact.relation.questions]
    for fact in rng.sample(facts, min(num_questions, len(facts))):
        made = exercises.ask(rng, fact, document, SIDE, QUOTES)
        depth = document.text.index(fact.passage) / len(document.text)
        asked[made.text] = (Question(made.text, made.answer, fact.passage, made.kind), depth)
    outcomes = [
        [is_right(question, reader.ask(document.text, question.text).text) for question, _ in asked.values()]
        for reader in (readers.scaled, readers.plain)
    ]
    return [Tried(*entry, *went) for entry, *went in zip(asked.values(), *outcomes, strict=True)]


def choose(tried: Sequence[Tried]) -> tuple[Tried, ...] | None:
    """The best three that the scaling makes the difference for, in the order of the document; None without them. Those
    that are written in haste are left out: a newcomer should not take them for what the model needs."""
    good = [one for one in tried if one.scaled and not one.plain and one.question.text[0].isupper()]
    good.sort(key=lambda one: one.depth)
    return max(combinations(good, NUM_QUESTIONS), key=score, default=None)


def score(chosen: Sequence[Tried]) -> tuple[int, int, int]:
    """Questions of many kinds, about many parts of the document, and short ones."""
    kinds = len({one.question.kind for one in chosen})
    parts = len({min(int(PARTS * one.depth), PARTS - 1) for one in chosen})
    return kinds, parts, -sum(len(one.question.text) for one in chosen)


def title(document: Document) -> str:
    """Its first line, or the beginning of that."""
    line = document.text.strip().split("\n")[0]
    return line if len(line) <= TITLE else line[:TITLE].rsplit(" ", 1)[0] + " …"


def store_lab(folder: Path, adapter: Path, model: Model, tokenizer: Tokenizer, trials: int) -> None:
    """Perplexity of held_out.txt, and pass keys hidden in it: without scaling, with it alone, and with its LoRA."""
    ids = tokenizer.encode((folder / "held_out.txt").read_text(encoding="utf-8"), add_bos=False)
    scaling = read_lora_config(adapter).rope_scaling
    rope = resolve_rope(model.config.raw, rope_scaling=scaling, source=str(adapter))
    name = scaling_name(rope)
    plain = Variant("no scaling", scaling_variant(model, "none", 1.0).rope)
    learned = adapter_variant(model, f"{name}, with its LoRA", adapter)
    store_curves(folder / FOLDER, model, ids, LENGTHS, [plain, Variant(name, rope), learned], CURVE_TOKENS)
    task = make_task("keys", tokenizer, ids, trials)
    store_maps(folder / FOLDER, model, ids, task, LENGTHS, DEPTHS, [plain, learned])
    print(f"stored curves and maps in {folder / FOLDER}")


if __name__ == "__main__":
    main()
