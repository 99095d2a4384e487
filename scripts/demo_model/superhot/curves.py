"""Perplexity of the first embedded model's held-out text, by length and by position, with LoRAs and without.

Each curve has the numbers that one `ropewalk perplexity` command prints; `Curve.command` is that command. What is
measured of every window is kept in a record (ropewalk/measure/record.py), so an interrupted run goes on.
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
from ropewalk.generate.evaluate import BlockSums, row_of, tokens_used
from ropewalk.generate.evaluate import read_windows as read
from ropewalk.measure.positions import by_position
from ropewalk.measure.record import Record, text_facts
from ropewalk.measure.settings import facts_of
from ropewalk.model.model import Model
from ropewalk.model.variants import AdapterUse, Variant, open_variant
from superhot.training import BY_PARTS, DYNAMIC, LINEAR, NTK, YARN

LOGGER = logging.getLogger(__name__)
LENGTHS = (512, 1024, 2048, 4096, 8192)
BIN = 256  # positions


@dataclass(frozen=True, slots=True)
class Curve:
    """What is measured. rope_scaling None: as the model was trained. adapter: a folder under adapters/."""

    label: str
    rope_scaling: Mapping[str, Any] | None
    adapter: str | None

    @property
    def command(self) -> str:
        """The command that measures the same on the model in FIRST. Adapters note their scaling themselves."""
        options = [f"--adapter FIRST/adapters/{self.adapter}"] if self.adapter else []
        if self.rope_scaling is not None and not self.adapter:
            options = [f"--rope-scaling '{json.dumps(self.rope_scaling)}'"]
        lengths = ",".join(map(str, LENGTHS))
        return " ".join(["ropewalk perplexity FIRST FIRST/held_out.txt", *options, "--lengths", lengths])


CURVES = (
    Curve("as trained", None, None),
    Curve("as trained + LoRA", {"rope_type": "default"}, "extrapolation"),
    Curve("linear 4", LINEAR, None),
    Curve("linear 4 + LoRA", LINEAR, "linear-4"),
    Curve("NTK 4", NTK, None),
    Curve("NTK 4 + LoRA", NTK, "ntk-4"),
    Curve("dynamic NTK", DYNAMIC, None),
    Curve("dynamic NTK + LoRA", DYNAMIC, "dynamic-ntk"),
    Curve("NTK-by-parts 4", BY_PARTS, None),
    Curve("NTK-by-parts 4 + LoRA", BY_PARTS, "ntk-by-parts-4"),
    Curve("YaRN 4", YARN, None),
    Curve("YaRN 4 + LoRA", YARN, "yarn-4"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One number of a curve. place: a context length, or the first of BIN positions; error: its standard error."""

    curve: str
    place: int
    perplexity: float
    error: float


def measure(folder: Path, record_path: Path, curves: Sequence[Curve] = CURVES) -> tuple[list[Point], list[Point]]:
    """(perplexity by length, perplexity by position in the longest) of curves of the model in `folder`.

    The text is held_out.txt, in windows that do not overlap, over the same tokens at every length.
    """
    text = (folder / "held_out.txt").read_bytes().decode("utf-8")
    ids = ropewalk.load_tokenizer(folder).encode(text, add_bos=False)
    model = ropewalk.load_model(folder, max_seq_len=max(LENGTHS))
    record = Record(record_path, "perplexity", text_facts(ids))
    by_length, by_place = [], []
    for curve in curves:
        LOGGER.info("%s: %s", curve.label, curve.command)
        for length, windows in read_curve(model, folder, ids, curve, record).items():
            row = row_of(windows)
            by_length.append(Point(curve.label, length, row.perplexity, row.error))
            if length == max(LENGTHS):
                places = by_position(windows, BIN)
                by_place += [Point(curve.label, row.start, row.perplexity, row.error) for row in places]
    return by_length, by_place


def read_curve(
    model: Model,
    folder: Path,
    ids: Sequence[int],
    curve: Curve,
    record: Record,
    lengths: Sequence[int] = LENGTHS,
    max_tokens: int | None = None,
) -> dict[int, list[BlockSums]]:
    """The windows of a curve, by length."""
    rope = ropewalk.resolve_rope(model.config.raw, rope_scaling=curve.rope_scaling, source=str(folder))
    uses = () if curve.adapter is None else (AdapterUse(curve.adapter, folder / "adapters" / curve.adapter),)
    made, chosen = open_variant(model, Variant(curve.label, rope, uses), max(lengths))
    kept = record.part(curve.label, facts_of(made, uses))
    used = ids[: tokens_used(len(ids), lengths, max_tokens, max(lengths))]
    return {length: read(made, used, length, lambda count: None, None, chosen, kept) for length in lengths}


def in_order(kept: Sequence[Point], measured: Sequence[Point]) -> list[Point]:
    """The points of both in the order of the curves; those of a curve that was measured replace what was kept of it."""
    anew = {point.curve for point in measured}
    points = [*measured, *(point for point in kept if point.curve not in anew)]
    labels = [curve.label for curve in CURVES]
    return sorted(points, key=lambda point: labels.index(point.curve))


def write_csv(points: Sequence[Point], path: Path, place: str = "length") -> None:
    """A line per number: curve, place, perplexity, standard error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("curve", place, "perplexity", "standard_error"))
        writer.writerows((one.curve, one.place, f"{one.perplexity:.4f}", f"{one.error:.4f}") for one in points)


def read_csv(path: Path) -> list[Point]:
    """What `write_csv` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Point(curve, int(place), float(value), float(error)) for curve, place, value, error in rows]
