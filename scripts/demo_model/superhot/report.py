"""The curves of curves.py as a Markdown table in the guide, and as a plot beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from first.training import CONTEXT
from superhot.curves import BIN, CURVES, LENGTHS, Point
from superhot.training import LENGTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
COLOURS = {
    "as trained": "#6b7280",
    "linear 4": "#d9480f",
    "NTK 4": "#9c36b5",
    "dynamic NTK": "#c2255c",
    "NTK-by-parts 4": "#1864ab",
    "YaRN 4": "#2b8a3e",
}
STYLES = {True: {"linestyle": "-", "marker": "o", "markersize": 4}, False: {"linestyle": "--", "marker": "."}}


def table(points: Sequence[Point]) -> str:
    """A row per curve, a column per length."""
    rows = _by_curve(points)
    lengths = sorted({point.place for point in points})
    lines = ["| RoPE scaling | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---" + "|--:" * len(lengths) + "|")
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{row[length]:.2f}" for length in lengths) + " |")
    return "\n".join(lines)


def commands() -> str:
    """The commands behind the rows, in their order."""
    return "\n".join(["```sh", *(curve.command for curve in CURVES), "```"])


def write_table(points: Sequence[Point], path: Path) -> None:
    """Replace what is between the marks in the guide."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} lacks the line {BEGIN} or {END}, between which the table goes")
    path.write_text(f"{before}{BEGIN}\n{table(points)}\n\n{commands()}\n{END}{after}", encoding="utf-8")


def draw(points: Sequence[Point], path: Path) -> None:
    """Perplexity by length, on logarithmic axes: a colour per scaling, full lines with a LoRA, dashed ones without."""
    figure, axes = _figure(points)
    lengths = sorted({point.place for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("context length (tokens)")
    _save(figure, path)


def draw_positions(points: Sequence[Point], path: Path) -> None:
    """Perplexity by position in one long context, each number in the middle of its bin."""
    figure, axes = _figure([replace(point, place=point.place + BIN // 2) for point in points])
    axes.set_xlim(0, max(LENGTHS))
    axes.set_xticks(range(0, max(LENGTHS) + 1, 1024), [f"{place:,}" for place in range(0, max(LENGTHS) + 1, 1024)])
    axes.minorticks_off()
    axes.set_xlabel(f"position in a context of {max(LENGTHS):,} tokens")
    _save(figure, path)


def _figure(points: Sequence[Point]) -> tuple[Figure, Axes]:
    """Lines, the lengths of training, and a legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.subplots()
    for label, row in _by_curve(points).items():
        scaling, _, with_adapter = label.partition(" + ")
        axes.plot(list(row), list(row.values()), label=label, color=COLOURS[scaling], **STYLES[bool(with_adapter)])
    for length, text in ((CONTEXT, "trained length"), (LENGTH, "length of the LoRAs")):
        axes.axvline(length, color="#9ca3af", linewidth=0.8, linestyle=":")
        axes.annotate(
            text, (length, 0.98), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2.0},
        )  # fmt: skip
    axes.set_yscale("log")
    ticks = [tick for tick in (5, 6, 8, 10, 12, 15, 20, 30, 40, 50, 70, 100, 150, 200) if _in_range(tick, points)]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylabel("held-out perplexity")
    axes.grid(color="#e5e7eb", linewidth=0.6)
    figure.legend(ncols=3, loc="outside lower center", frameon=False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _in_range(tick: float, points: Sequence[Point]) -> bool:
    values = [point.perplexity for point in points]
    return min(values) <= tick <= max(values)


def _by_curve(points: Sequence[Point]) -> dict[str, dict[int, float]]:
    rows: dict[str, dict[int, float]] = {}
    for point in points:
        rows.setdefault(point.curve, {})[point.place] = point.perplexity
    return rows
