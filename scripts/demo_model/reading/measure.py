"""All numbers of the card: each question is a file in RUN_FOLDER/numbers, and is asked once.

    python -m reading.measure --run RUN_FOLDER --model RUN_FOLDER/gptq

(in scripts/demo_model; RUN_FOLDER holds the float model and the LoRAs' folders). A file is measured anew only if what
it depends on has changed: weights, LoRA, sizes. So the same command goes on after an interruption, and does nothing
when all is there.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import corpus
import ropewalk
from reading import by_hand
from reading.evaluate import Setting, adapter_scaling, evaluate, summary
from reading.example import converse
from reading.extend import rope_scaling
from reading.network import Shape
from ropewalk.generate.evaluate import perplexity

LOGGER = logging.getLogger(__name__)

ADAPTERS = ("linear-4", "ntk-by-parts-4", "yarn-8")
CACHES = ("fp32", "q8", "q6", "q4", "q8_q4", "q4+256")
LENGTHS = (512, 1024, 2048, 4096)
PERPLEXITY_TOKENS = 8 * max(LENGTHS)
# The same scalings without a LoRA. Dynamic NTK follows the length, so its factor says nothing here.
SCALINGS: dict[str, dict[str, Any]] = {
    "as trained": {"rope_type": "default"},
    "linear 4": rope_scaling("linear", 4),
    "NTK-by-parts 4": rope_scaling("ntk-by-parts", 4),
    "NTK-by-parts 8": rope_scaling("ntk-by-parts", 8),
    "YaRN 4": rope_scaling("yarn", 4),
    "YaRN 8": rope_scaling("yarn", 8),
    "dynamic NTK": {"rope_type": "dynamic", "factor": 1.0, "original_max_position_embeddings": Shape().context},
}


@dataclass(frozen=True, slots=True)
class Job:
    """facts: what the numbers depend on, as JSON."""

    facts: dict[str, Any]
    measure: Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--model", type=Path, help="the quantised model (default: gptq in the run's folder)")
    parser.add_argument("--documents", type=int, default=60, help="documents of each length, eight questions each")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("ropewalk").setLevel(logging.ERROR)  # that lengths are beyond a scaling is meant
    (options.run / "numbers").mkdir(exist_ok=True)
    for name, job in jobs(options.run, options.model or options.run / "gptq", options.documents).items():
        path = numbers_path(options.run, name)
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["facts"] == job.facts:
            continue
        started = time.monotonic()
        found = {"facts": job.facts, "numbers": job.measure()}
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        LOGGER.info("%s: %.0f s", name, time.monotonic() - started)


def numbers_path(run: Path, name: str) -> Path:
    """The file of a job."""
    return run / "numbers" / f"{name}.json"


def jobs(run: Path, model: Path, documents: int) -> dict[str, Job]:
    """All there is to measure, by name.

    Raises:
        SystemExit: a model or a LoRA is not there yet.
    """
    for path in (run / "float", model, *(adapter_folder(run, name) for name in ADAPTERS)):
        if not path.is_dir():
            raise SystemExit(f"{path} is missing: reading.export and reading.extend write models and LoRAs")
    base = Setting(model, side="names", documents=documents)
    long = replace(base, lengths=LENGTHS, documents=long_documents(documents))
    settings = {
        "float": replace(base, model=run / "float", compute="exact"),
        "exact": replace(base, compute="exact"),
        "int8": base,
        **{f"side {side}": replace(base, side=side) for side in ("wordings", "types", "all")},
        **{f"layout {layout}": replace(base, layout=layout) for layout in ("system", "closed")},
        **{f"cache {cache}": replace(base, cache_type=cache) for cache in CACHES},
        **{f"length {name}": replace(long, rope_scaling=own) for name, own in SCALINGS.items()},
        **{f"lora {name}": replace(long, adapter=adapter_folder(run, name)) for name in ADAPTERS},
    }
    found = {name: _answers(setting) for name, setting in settings.items()}
    weights = {"float": _digest(run / "float"), "weights": _digest(model)}
    adapters = {name: _digest(adapter_folder(run, name)) for name in ADAPTERS}
    facts = {**weights, **adapters, "lengths": LENGTHS, "max_tokens": PERPLEXITY_TOKENS, "scalings": SCALINGS}
    found["perplexity"] = Job(_as_json(facts), lambda: perplexities(run, model))
    texts = {"texts": hashlib.sha256(by_hand.TEXTS.read_bytes()).hexdigest()}
    found["by hand"] = Job(weights | texts, lambda: by_hand.counts(model, None))
    for name, digest in adapters.items():
        asked = functools.partial(by_hand.counts, model, adapter_folder(run, name))
        found[f"by hand {name}"] = Job(weights | texts | {name: digest}, asked)
    found["example"] = Job(weights, lambda: converse(model))
    return found


def long_documents(documents: int) -> int:
    """Documents of each of LENGTHS: fewer, as long ones take long."""
    return 2 * documents // 5


def read_numbers(run: Path, model: Path) -> tuple[dict[str, Any], int]:
    """(what every job found, by name; the documents of each length).

    Raises:
        SystemExit: a job is missing, or its numbers are of other weights or sizes than the rest.
    """
    remedy = f"python -m reading.measure --run {run} --model {model} measures it"
    base = numbers_path(run, "int8")
    if not base.is_file():
        raise SystemExit(f"{base} is missing: {remedy}")
    documents = json.loads(base.read_text(encoding="utf-8"))["facts"]["documents"]
    numbers = {}
    for name, job in jobs(run, model, documents).items():
        path = numbers_path(run, name)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"facts": None}
        if kept["facts"] != job.facts:
            raise SystemExit(f"{path} is missing, or of other weights or sizes than the rest: {remedy}")
        numbers[name] = kept["numbers"]
    return numbers, documents


def adapter_folder(run: Path, name: str) -> Path:
    """Where reading.extend leaves a LoRA."""
    return run / name / "adapter"


def perplexities(run: Path, model: Path) -> dict[str, dict[str, float]]:
    """Curve -> length -> perplexity of the first PERPLEXITY_TOKENS tokens of the held-out text.

    The float model and exact arithmetic at the trained length; all else in the default arithmetic, with each scaling
    and each LoRA under its own.
    """
    _, held_out = corpus.split_documents(corpus.collect_documents())
    ids = ropewalk.load_tokenizer(model).encode(corpus.held_out_text(held_out), add_bos=False)
    trained = (Shape().context,)
    rows = {
        "float": _perplexity(ids, run / "float", trained, compute="exact"),
        "exact": _perplexity(ids, model, trained, compute="exact"),
    }
    for name, scaling in SCALINGS.items():
        rows[name] = _perplexity(ids, model, LENGTHS, rope_scaling=scaling)
    for name in ADAPTERS:
        rows[f"LoRA {name}"] = _perplexity(ids, model, LENGTHS, adapter=adapter_folder(run, name))
    return rows


def _perplexity(
    ids: list[int], folder: Path, lengths: tuple[int, ...], adapter: Path | None = None, **options: Any
) -> dict[str, float]:
    if adapter is not None:
        options["rope_scaling"] = adapter_scaling(adapter)
    model = ropewalk.load_model(folder, max_seq_len=max(lengths), **options)
    used = None
    if adapter is not None:
        model.load_adapter(adapter, "measured")
        used = ["measured"]
    rows = perplexity(model, ids, lengths, PERPLEXITY_TOKENS, adapters=used)
    return {str(row.length): row.perplexity for row in rows}


def _answers(setting: Setting) -> Job:
    facts = asdict(setting) | {"model": _digest(setting.model)}
    facts["adapter"] = setting.adapter and _digest(setting.adapter)
    return Job(_as_json(facts), lambda: summary(evaluate(setting)))


def _digest(folder: Path) -> str:
    """SHA-256 of a folder's weights."""
    (path,) = folder.glob("*.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(facts))


if __name__ == "__main__":
    main()
