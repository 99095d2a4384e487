"""Exact answers of a model through the engine, by length, depth, kind of question and document type.

    python -m reading.evaluate [MODEL_FOLDER] --lengths 512,2048 --rope-scaling '{...}' --adapter linear-4

(in scripts/demo_model; the defaults are those of Setting). An answer counts if each of its tokens, the end included, is
the likeliest after the right ones before it: then greedy generation writes it. All names are held out; --side says what
else is. A refusal is an answer that begins as "Not in the text" does: false where the text has the answer.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import ropewalk
from reading import exercises
from reading.trials import DEPTHS, FORMATS, SIDES, Asked, Trial, document_trial, key_value_trial, pass_key_trial
from reading.vocabulary import Encoder
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.model import Model

ADAPTER = "measured"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked of which model, and how that is run.

    lengths: tokens of document and question. side: what is held out beside the names. layout: one of trials.FORMATS.
    documents: of each length, eight questions each. rope_scaling: as for `load_model`; None: what the LoRA was made
    for, or else what the folder declares.
    """

    model: Path
    lengths: tuple[int, ...] = (256, 512)
    side: str = "all"
    layout: str = "plain"
    documents: int = 25
    rope_scaling: dict[str, Any] | None = None
    adapter: Path | None = None
    compute: str = "int8"
    cache_type: str = "fp16"
    threads: int = 2
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one question went."""

    length: int
    asked: Asked
    exact: bool
    refused: bool


def main() -> None:
    options = vars(parse_options())
    logging.basicConfig(level=logging.WARNING)
    json_path = options.pop("json")
    outcomes = evaluate(Setting(**options))
    print(report(outcomes))
    if json_path is not None:
        json_path.write_text(json.dumps(summary(outcomes), indent=2) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=demo_model_path(), help="(default: the embedded model)")
    parser.add_argument("--lengths", type=_numbers, help="tokens of document and question")
    parser.add_argument("--side", choices=SIDES, help="what is held out beside the names")
    parser.add_argument("--layout", choices=FORMATS, help="how a question is put")
    parser.add_argument("--documents", type=int, help="documents of each length, eight questions each")
    parser.add_argument("--rope-scaling", type=json.loads, help="JSON object")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA")
    parser.add_argument("--compute")
    parser.add_argument("--cache-type")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    defaults = {field.name: field.default for field in fields(Setting) if field.name != "model"}
    parser.set_defaults(**defaults)
    return parser.parse_args()


def evaluate(setting: Setting) -> list[Outcome]:
    """All outcomes of a setting, length by length."""
    encoder = Encoder((setting.model / "tokenizer.model").read_bytes())
    model = ropewalk.load_model(
        setting.model,
        max_seq_len=max(setting.lengths),
        compute=setting.compute,
        cache_type=setting.cache_type,
        rope_scaling=setting.rope_scaling or adapter_scaling(setting.adapter),
        threads=setting.threads,
    )
    if setting.adapter is not None:
        model.load_adapter(setting.adapter, ADAPTER)
    return [outcome for length in setting.lengths for outcome in measure(model, encoder, length, setting)]


def adapter_scaling(folder: Path | None) -> dict[str, Any] | None:
    """The RoPE scaling that a LoRA was made for."""
    if folder is None:
        return None
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("rope_scaling")


def measure(model: Model, encoder: Encoder, length: int, setting: Setting) -> Iterable[Outcome]:
    """All outcomes at a length. Lists and pass keys are asked for in the plain layout, with held-out names alone."""
    rng = random.Random(f"{setting.seed} {length} {setting.side}")
    side = SIDES[setting.side]
    trials = [document_trial(rng, encoder, length, side, setting.layout) for _ in range(setting.documents)]
    trials += [key_value_trial(rng, encoder, length) for _ in range(max(1, setting.documents // 5))]
    depths = [place / (DEPTHS - 1) for place in range(DEPTHS)]
    trials += [pass_key_trial(rng, encoder, length, depths[n % DEPTHS]) for n in range(max(DEPTHS, setting.documents))]
    refusal = encoder.encode(f" {exercises.NOT_IN_TEXT}")[0]
    for trial in trials:
        yield from outcomes_of(model, trial, length, refusal, ADAPTER if setting.adapter else None)


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
    """length -> group -> share of exact answers; groups: all that is in the text, kinds, depths, types, refusals.

    A depth is the start of a fifth of the document; that of a pass key is where it stands, from 0 to 1.
    """
    groups: dict[int, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        here, asked = groups[outcome.length], outcome.asked
        if asked.kind in ("key", "pass key"):
            here[asked.kind].append(outcome.exact)
            if asked.kind == "pass key":
                here[f"pass key at {asked.depth:.2f}"].append(outcome.exact)
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


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
