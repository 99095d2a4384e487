"""measure/plots.py: what stands in a plot, as text of an SVG, and what is refused."""

from __future__ import annotations

import sys
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


def test_the_map_says_the_share_of_keys_in_every_cell() -> None:
    pytest.importorskip("matplotlib")
    text = svg_text(plot_retrieval(CELLS, "yarn"))
    assert text.count(">25%<") == 4
    for word in ("yarn", "1,024", "100%", "depth of the key"):
        assert f">{word}<" in text


def test_an_unfinished_map_is_drawn_as_far_as_it_goes() -> None:
    pytest.importorskip("matplotlib")
    assert svg_text(plot_retrieval(CELLS[:3])).count(">25%<") == 3


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
