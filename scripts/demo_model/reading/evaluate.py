"""Exact answers of a model through the engine, by length, depth, kind of question and document type.

    python -m reading.evaluate [MODEL_FOLDER] --lengths 512,2048 --rope-scaling '{...}' --adapter linear-4

(in scripts/demo_model). An answer counts if each of its tokens, the end included, is the likeliest after the right ones
before it: then greedy generation writes it. All names are held out; --side says what else is. A refusal is an answer
that begins as "Not in the text" does: false where the text has the answer.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import ropewalk
from reading import exercises
from reading.trials import DEPTHS, SIDES, Asked, Trial, document_trial, key_value_trial, pass_key_trial
from reading.vocabulary import Encoder
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.model import Model

ADAPTER = "measured"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one question went."""

    length: int
    asked: Asked
    exact: bool
    refused: bool


def main() -> None:
    options = parse_options()
    logging.basicConfig(level=logging.WARNING)
    folder = options.model or demo_model_path()
    encoder = Encoder((folder / "tokenizer.model").read_bytes())
    model = ropewalk.load_model(
        folder,
        max_seq_len=max(options.lengths),
        compute=options.compute,
        cache_type=options.cache_type,
        rope_scaling=options.rope_scaling or adapter_scaling(options.adapter),
        threads=options.threads,
    )
    if options.adapter is not None:
        model.load_adapter(options.adapter, ADAPTER)
    outcomes = [outcome for length in options.lengths for outcome in measure(model, encoder, length, options)]
    print(report(outcomes))
    if options.json is not None:
        options.json.write_text(json.dumps(summary(outcomes), indent=2) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="model folder (default: the embedded model)")
    parser.add_argument("--lengths", type=_numbers, default=[256, 512], help="tokens of document and question")
    parser.add_argument("--side", choices=SIDES, default="all", help="what is held out beside the names")
    parser.add_argument("--documents", type=int, default=25, help="documents of each length, eight questions each")
    parser.add_argument("--rope-scaling", type=json.loads, help="JSON object")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA")
    parser.add_argument("--compute", default="int8")
    parser.add_argument("--cache-type", default="fp16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args()


def adapter_scaling(folder: Path | None) -> dict | None:
    """The RoPE scaling that a LoRA was made for."""
    if folder is None:
        return None
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("rope_scaling")


def measure(model: Model, encoder: Encoder, length: int, options: argparse.Namespace) -> Iterable[Outcome]:
    """All outcomes at a length."""
    rng = random.Random(f"{options.seed} {length} {options.side}")
    side = SIDES[options.side]
    trials = [document_trial(rng, encoder, length, side) for _ in range(options.documents)]
    trials += [key_value_trial(rng, encoder, length) for _ in range(max(1, options.documents // 5))]
    depths = [place / (DEPTHS - 1) for place in range(DEPTHS)]
    trials += [pass_key_trial(rng, encoder, length, depths[n % DEPTHS]) for n in range(max(DEPTHS, options.documents))]
    refusal = encoder.encode(f" {exercises.NOT_IN_TEXT}")[0]
    for trial in trials:
        yield from outcomes_of(model, trial, length, refusal, ADAPTER if options.adapter else None)


def outcomes_of(model: Model, trial: Trial, length: int, refusal: int, adapters: str | None) -> Iterable[Outcome]:
    """The questions of a trial, one after the other on the same document. refusal: first token of a refusal."""
    cache = model.new_cache(length)
    with torch.inference_mode():
        model.forward(trial.context, cache, "none", seq_len=length, adapters=adapters)
        for asked in trial.asked:
            cache.truncate(len(trial.context))
            ids = [*asked.ids, *asked.answer[:-1]]
            logits = model.forward(ids, cache, "all", seq_len=length, adapters=adapters)  # [T, V]
            found = logits[-len(asked.answer) :].argmax(dim=1).tolist()
            yield Outcome(length, asked, found == list(asked.answer), found[0] == refusal)


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, dict[str, float]]]:
    """length -> group -> share of exact answers; groups: all that is in the text, kinds, depths, types, refusals."""
    groups: dict[int, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        here, asked = groups[outcome.length], outcome.asked
        if asked.kind in ("key", "pass key"):
            here[asked.kind].append(outcome.exact)
            continue
        here[f"kind {asked.kind}"].append(outcome.exact)
        if asked.kind == "absent":
            continue
        here["answered"].append(outcome.exact)
        here["false refusals"].append(outcome.refused)
        here[f"depth {min(int(asked.depth * DEPTHS), DEPTHS - 1) / DEPTHS:.1f}"].append(outcome.exact)
        here[f"type {asked.type}"].append(outcome.exact)
    return {
        str(length): {
            name: {"share": sum(hits) / len(hits), "questions": len(hits)} for name, hits in sorted(here.items())
        }
        for length, here in groups.items()
    }


def report(outcomes: Sequence[Outcome]) -> str:
    """A table: a line per group, a column per length."""
    numbers = summary(outcomes)
    names = sorted({name for here in numbers.values() for name in here}, key=lambda name: (name != "answered", name))
    lines = [f"{'exact answers, %':24}" + "".join(f"{length:>14}" for length in numbers)]
    for name in names:
        cells = [here.get(name) for here in numbers.values()]
        shown = [f"{100 * c['share']:6.1f} ({c['questions']:4d})" if c else "-" for c in cells]
        lines.append(f"{name:24}" + "".join(f"{cell:>14}" for cell in shown))
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
