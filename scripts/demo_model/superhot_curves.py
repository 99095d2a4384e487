"""Perplexity of the embedded model's held-out text by context length, through the engine: with and without LoRAs.

Each curve has the numbers that one `ropewalk perplexity` command prints; `Curve.command` is that command.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ropewalk
from ropewalk.generate.evaluate import perplexity
from superhot_training import BY_PARTS, LINEAR

LOGGER = logging.getLogger(__name__)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Curve:
    """What is measured. rope_scaling None: as the model was trained. adapter: a folder under adapters/."""

    label: str
    rope_scaling: Mapping[str, Any] | None
    adapter: str | None

    @property
    def command(self) -> str:
        """The command that measures the same. Adapters need no option for their scaling: they note it themselves."""
        options = [f"--adapter {self.adapter}"] if self.adapter else []
        if self.rope_scaling is not None and not self.adapter:
            options = [f"--rope-scaling '{json.dumps(self.rope_scaling)}'"]
        return " ".join(["ropewalk perplexity", *options, "--lengths", ",".join(map(str, LENGTHS))])


CURVES = (
    Curve("as trained", None, None),
    Curve("as trained + LoRA", {"rope_type": "default"}, "extrapolation"),
    Curve("linear 4", LINEAR, None),
    Curve("linear 4 + LoRA", LINEAR, "linear-4"),
    Curve("NTK-by-parts 4", BY_PARTS, None),
    Curve("NTK-by-parts 4 + LoRA", BY_PARTS, "ntk-by-parts-4"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One number of a curve."""

    curve: str
    length: int
    perplexity: float


def measure(folder: Path, path: Path) -> None:
    """All curves of the model in `folder`, into the CSV at `path`.

    A curve that is there already is kept, so that an interrupted run can continue; one whose LoRA has not been trained
    yet is left out.
    """
    known = read_csv(path) if path.is_file() else []
    for curve in CURVES:
        if curve.adapter is not None and not (folder / "adapters" / curve.adapter).is_dir():
            LOGGER.info("%s: left out, there is no LoRA %s", curve.label, curve.adapter)
        elif any(point.curve == curve.label for point in known):
            LOGGER.info("%s: measured already", curve.label)
        else:
            LOGGER.info("%s: %s", curve.label, curve.command)
            known += measure_curve(folder, curve)
            order = [curve.label for curve in CURVES]
            known.sort(key=lambda point: (order.index(point.curve), point.length))
            write_csv(known, path)


def measure_curve(folder: Path, curve: Curve, lengths: Sequence[int] = LENGTHS) -> list[Point]:
    """The perplexity of held_out.txt in windows that do not overlap, over the same tokens at every length."""
    text = (folder / "held_out.txt").read_bytes().decode("utf-8")
    ids = ropewalk.load_tokenizer(folder).encode(text, add_bos=False)
    model = ropewalk.load_model(folder, max_seq_len=max(lengths), rope_scaling=curve.rope_scaling)
    if curve.adapter is not None:
        model.load_adapter(folder / "adapters" / curve.adapter, curve.adapter)
    chosen = None if curve.adapter is None else [curve.adapter]
    rows = perplexity(model, ids, lengths, adapters=chosen)
    return [Point(curve.label, row.length, row.perplexity) for row in rows]


def write_csv(points: Sequence[Point], path: Path) -> None:
    """A line per number: curve, length, perplexity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("curve", "length", "perplexity"))
        writer.writerows((point.curve, point.length, f"{point.perplexity:.4f}") for point in points)


def read_csv(path: Path) -> list[Point]:
    """What `write_csv` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Point(row["curve"], int(row["length"]), float(row["perplexity"])) for row in csv.DictReader(file)]
