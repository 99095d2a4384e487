"""measure/plots.py: what stands in a plot, as text of an SVG, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ropewalk.base.errors import RequestError, UnsupportedError
from ropewalk.generate.evaluate import PerplexityRow
from ropewalk.measure.compare import Curve
from ropewalk.measure.plots import plot_curves, plot_retrieval, save_plot, svg_text
from ropewalk.measure.retrieval import RetrievalCell

CURVES = [
    Curve(name, "", tuple(PerplexityRow(length, 1, length - 1, 2.0, 1.0) for length in (256, 2048)))
    for name in ("none", "yarn")
]
CELLS = [RetrievalCell(length, depth, 4, 0.25, 0.5) for length in (256, 1024) for depth in (0.0, 1.0)]


def test_the_curves_are_named_and_the_lengths_stand_below() -> None:
    pytest.importorskip("matplotlib")
    text = svg_text(plot_curves(CURVES))
    assert text.startswith("<svg")
    for word in ("none", "yarn", "256", "2,048", "perplexity (lower is better)"):
        assert f">{word}<" in text


def test_colour_and_number_of_a_cell_say_the_same_and_the_legend_says_what() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_retrieval([replace(CELLS[0], found=0.0, tokens_found=0.75), *CELLS[1:]], "yarn")
    axes = figure.axes[0]
    coloured = axes.images[0].get_array()
    for text in axes.texts:
        column, row = text.get_position()
        assert text.get_text() == f"{100 * coloured[row][column]:.0f}%"
    assert len(axes.texts) == 4 and "75%" in {text.get_text() for text in axes.texts}
    said = svg_text(figure)
    for word in ("yarn", "1,024", "depth of the answer", "share of the answer's tokens found"):
        assert f">{word}<" in said


@pytest.mark.parametrize("num_lengths", [1, 2, 6, 7, 12])
def test_no_text_of_a_map_leaves_its_cell_or_the_picture(num_lengths: int) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    lengths = [131_072 - 1024 * number for number in range(num_lengths)]
    cells = [RetrievalCell(length, depth, 4, 1.0, 1.0) for length in lengths for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    figure = plot_retrieval(cells, "adapter ntk-by-parts-4")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes, bar = figure.axes
    width = axes.get_window_extent(renderer).width / num_lengths
    for text in axes.texts:
        assert text.get_window_extent(renderer).width < width
    labels = [axes.title, axes.xaxis.label, axes.yaxis.label, bar.yaxis.label, *axes.get_xticklabels()]
    for text in (*labels, *axes.get_yticklabels(), *bar.get_yticklabels()):
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, text
    ticks = [tick.get_window_extent(renderer) for tick in axes.get_xticklabels()]
    if num_lengths <= 6:  # more stand aslant, and share their boxes but no letters
        assert all(left.x1 < right.x0 for left, right in zip(ticks, ticks[1:], strict=False))


def test_an_unfinished_map_is_drawn_as_far_as_it_goes() -> None:
    pytest.importorskip("matplotlib")
    assert len(plot_retrieval(CELLS[:3]).axes[0].texts) == 3


@pytest.mark.parametrize("name", ["a.svg", "a.png", "a.pdf"])
def test_a_plot_is_written_in_the_format_of_its_name(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    save_plot(plot_curves(CURVES), tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000


def test_other_names_and_places_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(RequestError, match="must end in .svg, .png, .pdf"):
        save_plot(plot_curves(CURVES), tmp_path / "a.gif")
    with pytest.raises(RequestError, match="cannot be written"):
        save_plot(plot_curves(CURVES), tmp_path / "missing" / "a.svg")


def test_nothing_measured_is_nothing_to_plot() -> None:
    with pytest.raises(RequestError, match="no variant was measured"):
        plot_curves([Curve("none", "", ())])
    with pytest.raises(RequestError, match="no cell was measured"):
        plot_retrieval([])


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pip install \"ropewalk\[plots\]\""):
        plot_curves(CURVES)
