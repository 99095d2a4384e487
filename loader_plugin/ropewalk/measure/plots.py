"""Plots of what this room measures, with matplotlib (the extra "plots").

Lines and letters are mid-grey and the background is transparent, so that a plot fits a light and a dark page. Text
in an SVG stays text, in the reader's fonts.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.base.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from ropewalk.measure.compare import Curve, PositionCurve
    from ropewalk.measure.divergence import Divergence
    from ropewalk.measure.recommend import Recommendation
    from ropewalk.measure.retrieval import RetrievalCell
    from ropewalk.measure.speed import Speeds

INK = "#8a8580"
# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow and black are left out for the two themes.
COLOURS = ("#0f9d8a", "#d98a1f", "#5b8dd6", "#cc6f9f", "#b9513a", "#8a6fc0", "#6d9e3f", "#56b4e9")
MARKERS = "os^Dv*PX"
SIZE = (6.4, 3.8)  # inches; readable at 360 and at 900 pixels
FEW = 6  # lengths that stand beside each other below a map without touching
FORMATS = ("svg", "png", "pdf")


def plot_curves(curves: Sequence[Curve], trained: int | None = None) -> Figure:
    """Perplexity by context length, a line per variant. trained: the length that the model was trained on, marked.

    One line alone has a band of one standard error. Several do not: that error is of the text, which all of them read,
    and bands that overlap would look as if they could not be told apart.

    Raises:
        RequestError: there is nothing to plot. UnsupportedError: matplotlib is not installed.
    """
    curves = [curve for curve in curves if curve.rows]
    if not curves:
        raise RequestError("there is nothing to plot: no variant was measured to its end")
    figure, axes = _figure()
    for number, curve in enumerate(curves):
        points = [(row.length, row.perplexity, row.nll_error) for row in curve.rows]
        _draw_line(axes, number, curve.name, points, len(curves) == 1)
    lengths = sorted({row.length for curve in curves for row in curve.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], **_aslant(len(lengths)))
    axes.set_xlabel("context length in tokens")
    _finish_perplexity(figure, axes, len(curves), trained)
    return figure


def plot_positions(curves: Sequence[PositionCurve], trained: int | None = None) -> Figure:
    """Perplexity by position in the context, a line per variant. Arguments and errors as for `plot_curves`."""
    curves = [curve for curve in curves if curve.rows]
    if not curves:
        raise RequestError("there is nothing to plot: no variant was measured to its end")
    figure, axes = _figure()
    for number, curve in enumerate(curves):
        points = [((row.start + row.end) / 2, row.perplexity, row.nll_error) for row in curve.rows]
        _draw_line(axes, number, curve.name, points, len(curves) == 1)
    end = max(row.end for curve in curves for row in curve.rows)
    step = 2 ** math.floor(math.log2(max(end, 4) / 4))
    places = range(0, end + 1, step)
    axes.set_xlim(0, end)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set_xlabel("position in the context")
    _finish_perplexity(figure, axes, len(curves), trained)
    return figure


def plot_divergence(found: Sequence[Divergence], base: str) -> Figure:
    """The KL divergence of settings from the base: mean (bar) and 99th percentile (mark), and agreement in words.

    Raises:
        RequestError: there is nothing to plot. UnsupportedError: matplotlib is not installed.
    """
    if not found:
        raise RequestError("there is nothing to plot: no setting was measured to its end")
    figure, axes = _figure(height=1.3 + 0.42 * len(found))
    places = range(len(found))
    least = min([value for d in found for value in (d.kl_mean, d.kl_median) if value > 0], default=1e-6) / 3
    means = [max(d.kl_mean, least) for d in found]
    axes.barh(places, [mean - least for mean in means], left=least, color=COLOURS[0], height=0.55, label="mean")
    axes.plot(
        [max(d.kl_99, least) for d in found],
        places,
        linestyle="",
        marker="d",
        color=COLOURS[1],
        label="99th percentile",
    )
    for place, d in zip(places, found, strict=True):
        right = max(d.kl_99, d.kl_mean, least)
        axes.annotate(
            f"{100 * d.agreement:.2f}% same", (right, place), xytext=(8, 0), textcoords="offset points",
            va="center", color=INK, fontsize=8,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(least, max(max(d.kl_99, d.kl_mean, least) for d in found) * 12)
    axes.set_yticks(places, [d.name for d in found])
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.set_xlabel(f"KL divergence from {base} in nats")
    axes.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
    figure.legend(frameon=False, labelcolor=INK, ncols=2, fontsize=9, loc="outside upper center")
    return figure


def plot_recommendation(found: Recommendation) -> Figure:
    """The perplexity of every scaling that was measured, the best above, with the standard error of its distance from
    the best; the choice in another colour.

    Raises:
        RequestError: there is nothing to plot. UnsupportedError: matplotlib is not installed.
    """
    if not found.measured:
        raise RequestError("there is nothing to plot: no scaling was measured to its end")
    ordered = sorted(found.measured, key=lambda one: one.row.mean_nll)
    figure, axes = _figure(height=1.0 + 0.32 * len(ordered))
    values = [one.row.perplexity for one in ordered]
    errors = [value * (one.behind_error or 0.0) for value, one in zip(values, ordered, strict=True)]
    least = 0.8 * min(values)
    colours = [COLOURS[0] if one is found.chosen else INK for one in ordered]
    axes.barh(range(len(ordered)), [value - least for value in values], left=least, color=colours, height=0.6)
    axes.errorbar(values, range(len(ordered)), xerr=errors, fmt="none", ecolor=COLOURS[1], capsize=2, linewidth=1.2)
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        axes.annotate(
            f"{value:,.2f}", (value + error, place), xytext=(5, 0), textcoords="offset points",
            va="center", color=INK, fontsize=8,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(least, 1.5 * max(value + error for value, error in zip(values, errors, strict=True)))
    _plain_numbers(axes.xaxis)
    axes.set_yticks(range(len(ordered)), [one.candidate.name for one in ordered])
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.set_xlabel(f"perplexity at {found.length:,} tokens (lower is better)")
    return figure


def plot_retrieval(cells: Sequence[RetrievalCell], title: str = "") -> Figure:
    """A map of depth by length. Colour and number of a cell say the same: the share of the answer's tokens found. Whole
    answers, of which a small model finds none, are in the table (`cells_csv`).

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
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], **_aslant(len(lengths)))
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    axes.set_xlabel("context length in tokens")
    axes.set_ylabel("depth of the answer")
    axes.set_title(title, color=INK, fontsize=10)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("share of the answer's tokens found", color=INK)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    bar.ax.tick_params(colors=INK)
    bar.outline.set_visible(False)
    return figure


def plot_roofline(found: Speeds) -> Figure:
    """What the machine allows, by operations to a byte, and where each way to run the model stands below it (Williams
    et al. 2009, "Roofline").

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    figure, axes = _figure()
    limit = found.limit
    corner = limit.operations / limit.read_bytes
    places = [speed.operations / speed.num_bytes for speed in found.speeds]
    left, right = min(*places, corner) / 3, max(*places, corner) * 3
    roof = [(left, left * limit.read_bytes), (corner, limit.operations), (right, limit.operations)]
    axes.plot(*zip(*((x, y / 1e9) for x, y in roof), strict=True), color=INK, linewidth=1.6)
    for number, (speed, place) in enumerate(zip(found.speeds, places, strict=True)):
        rates = sorted(rate * speed.operations / 1e9 for rate in speed.tokens_s)
        middle = statistics.median(rates)
        axes.errorbar(
            [place], [middle], yerr=[[middle - rates[0]], [rates[-1] - middle]], linestyle="", capsize=2, markersize=6,
            marker=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)], label=speed.name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes.xaxis, (1,))
    _plain_numbers(axes.yaxis, (1, 2, 5))
    axes.set_xlabel("operations to a byte of memory")
    axes.set_ylabel(f"{found.kind} operations, GOP/s")
    for text, place, beside in (
        (f"memory, {limit.read_bytes / 1e9:.1f} GB/s", (left, left * limit.read_bytes / 1e9), (14, -2)),
        (f"products, {limit.operations / 1e9:,.0f} GOP/s", (corner, limit.operations / 1e9), (2, 4)),
    ):
        axes.annotate(text, place, xytext=beside, textcoords="offset points", color=INK, fontsize=8)
    axes.margins(y=0.12)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, labelcolor=INK, ncols=2, fontsize=9, loc="outside upper center")
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
    check_plottable(path)
    try:
        figure.savefig(path, transparent=path.suffix == ".svg", dpi=150)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error


def check_plottable(path: Path) -> None:
    """Raises:
    RequestError: a name of another format. UnsupportedError: matplotlib is not installed.
    """
    if path.suffix.removeprefix(".") not in FORMATS:
        raise RequestError(f"{path}: the name of a plot must end in {', '.join(f'.{name}' for name in FORMATS)}")
    _figure()


def _draw_line(
    axes: Axes, number: int, name: str, points: Sequence[tuple[float, float, float | None]], with_band: bool
) -> None:
    """One curve of (place, perplexity, standard error of its logarithm)."""
    places, values, errors = zip(*points, strict=True)
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    style = "-" if number < len(COLOURS) else "--"  # of a second round of colours
    axes.plot(places, values, style, color=colour, marker=marker, markersize=5, linewidth=1.8, label=name)
    if with_band:
        factors = [math.exp(error or 0.0) for error in errors]
        low = [value / factor for value, factor in zip(values, factors, strict=True)]
        high = [value * factor for value, factor in zip(values, factors, strict=True)]
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _finish_perplexity(figure: Figure, axes: Axes, num_curves: int, trained: int | None) -> None:
    """What plots of perplexity have in common: a logarithmic axis, the trained length, and a legend outside."""
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.minorticks_off()
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    low, high = axes.get_xlim()
    if trained is not None and low <= trained <= high:
        axes.axvline(trained, color=INK, linewidth=1.0, linestyle=":")
        axes.annotate(
            "trained length", (trained, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3),
            textcoords="offset points", va="top", color=INK, fontsize=8,
        )  # fmt: skip
    columns = min(num_curves, 3)
    figure.legend(frameon=False, labelcolor=INK, ncols=columns, fontsize=9, loc="outside upper center")
    rows = -(-num_curves // columns)
    figure.set_size_inches(SIZE[0], SIZE[1] + 0.2 * max(0, rows - 1))


def _plain_numbers(axis: Axis, steps: Sequence[float] = (1, 1.5, 2, 3, 5, 7)) -> None:
    """A logarithmic axis with numbers as they are spoken: these times powers of ten."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=steps))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def _aslant(count: int) -> dict[str, Any]:
    """How labels stand below an axis."""
    return {} if count <= FEW else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}


def _figure(height: float = SIZE[1]) -> tuple[Figure, Axes]:
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
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.5)
    axes.tick_params(colors=INK, which="both")
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes
