"""Plots of what measure/compare.py and measure/retrieval.py find, with matplotlib (the extra "plots").

Lines and letters are mid-grey and the background is transparent, so that a plot fits a light and a dark page. Text
in an SVG stays text, in the reader's fonts.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.base.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ropewalk.measure.compare import Curve
    from ropewalk.measure.retrieval import RetrievalCell

INK = "#8a8580"
# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow and black are left out for the two themes.
COLOURS = ("#0f9d8a", "#d98a1f", "#5b8dd6", "#cc6f9f", "#b9513a", "#8a6fc0", "#6d9e3f", "#56b4e9")
MARKERS = "os^Dv*PX"
SIZE = (6.4, 3.6)  # inches; readable at 360 and at 900 pixels
FEW = 6  # lengths that stand beside each other below a map without touching
FORMATS = ("svg", "png", "pdf")


def plot_curves(curves: Sequence[Curve]) -> Figure:
    """Perplexity by context length, a line per variant.

    Raises:
        RequestError: there is nothing to plot. UnsupportedError: matplotlib is not installed.
    """
    curves = [curve for curve in curves if curve.rows]
    if not curves:
        raise RequestError("there is nothing to plot: no variant was measured to its end")
    figure, axes = _figure()
    from matplotlib import ticker

    for number, curve in enumerate(curves):
        axes.plot(
            [row.length for row in curve.rows],
            [row.perplexity for row in curve.rows],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=1.8,
            label=curve.name,
        )
    lengths = sorted({row.length for curve in curves for row in curve.rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("context length in tokens")
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=INK, ncols=2, fontsize=9)
    return figure


def plot_retrieval(cells: Sequence[RetrievalCell], title: str = "") -> Figure:
    """A map of depth by length. Colour and number of a cell say the same: the share of the key's tokens found. Whole
    keys, of which a small model finds none, are in the table (`cells_csv`).

    Raises:
        RequestError: there is nothing to plot. UnsupportedError: matplotlib is not installed.
    """
    if not cells:
        raise RequestError("there is nothing to plot: no cell was measured to its end")
    lengths, depths = (sorted({getattr(cell, name) for cell in cells}) for name in ("length", "depth"))
    values = [[float("nan")] * len(lengths) for _ in depths]
    figure, axes = _figure()
    for cell in cells:
        row, column = depths.index(cell.depth), lengths.index(cell.length)
        values[row][column] = cell.tokens_found
        ink = "white" if cell.tokens_found < 0.6 else "#10302c"
        share = f"{100 * cell.tokens_found:.0f}%"
        axes.text(column, row, share, ha="center", va="center", color=ink, fontsize=9 if len(lengths) <= FEW else 7)
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    upright = {} if len(lengths) <= FEW else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], **upright)
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    axes.set_xlabel("context length in tokens")
    axes.set_ylabel("depth of the key")
    axes.set_title(title, color=INK, fontsize=10)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("share of the key's tokens found", color=INK)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    bar.ax.tick_params(colors=INK)
    bar.outline.set_visible(False)
    return figure


def svg_text(figure: Figure) -> str:
    """The plot as an SVG element, to stand in a page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True)
    return out.getvalue()[out.getvalue().index("<svg") :]


def save_plot(figure: Figure, path: Path) -> None:
    """Write it in the format that its name ends with.

    Raises:
        RequestError: another ending, or the file cannot be written.
    """
    if path.suffix.removeprefix(".") not in FORMATS:
        raise RequestError(f"{path}: the name of a plot must end in {', '.join(f'.{name}' for name in FORMATS)}")
    try:
        figure.savefig(path, transparent=path.suffix == ".svg", dpi=150)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error


def _figure() -> tuple[Figure, object]:
    """An empty plot, made without pyplot, whose figures stay until they are closed and are not thread-safe."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            'plots need matplotlib, which is not installed: pip install "ropewalk[plots]"'
        ) from error
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["font.family"] = "sans-serif"
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.5)
    axes.tick_params(colors=INK, which="both")
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes
