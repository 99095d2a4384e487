"""The context lab: perplexity by length, what is found again by depth and length, and which scaling to take.

The room `ropewalk.measure` does the measuring: compare, retrieval and recommend. It runs on a variant of the loaded
model that shares its weights, so that conversations can go on meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.base.limits import MAX_SEQ_LEN
from ropewalk.gradio_demo.model_bar.workbench import Loaded, Workbench
from ropewalk.gradio_demo.replies.measuring import Measured, Measurement
from ropewalk.gradio_demo.replies.running import Running
from ropewalk.gradio_demo.shared.texts import read_text_file
from ropewalk.gradio_demo.shared.visitors import Visitor
from ropewalk.measure.compare import Curve, compare_perplexity, curves_csv
from ropewalk.measure.plots import plot_curves, plot_recommendation, plot_retrieval, svg_text
from ropewalk.measure.recommend import RULE, Recommendation, recommend, recommendation_csv, recommendation_rows
from ropewalk.measure.retrieval import RetrievalCell, cells_csv, retrieval_map
from ropewalk.measure.stored import Map, read_lab
from ropewalk.measure.tables import csv_text, with_error
from ropewalk.measure.tasks import make_task
from ropewalk.model.model import Model
from ropewalk.model.variants import Variant, adapter_variant, open_variant, scaling_variant
from ropewalk.rope.spellings import AS_LOADED, SCALINGS
from ropewalk.tour.tour import FOLDER

HELD_OUT = "held_out.txt"
MAX_LENGTHS = 12
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ADAPTER_MARK = "adapter "
CELL_COLUMNS = ("length", "depth", "found", "tokens found")
STORED = "Measured when the model was made, and stored with it. Measure does it anew, with what is chosen above."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabView:
    """What is shown at one moment. rows: the table under `columns`; csv: a file to download; advice: what to take, and
    why, as paragraphs."""

    measured: Measured
    svg: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    csv: Path | None = None
    advice: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Shown:
    """A result as a view has it."""

    svg: str
    table: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    advice: tuple[str, ...] = ()


class ContextLab:
    """Measurements that visitors ask for; one at a time per open page."""

    def __init__(self, workbench: Workbench, running: Running, exports: Path) -> None:
        self._workbench = workbench
        self._running = running
        self._exports = exports
        self._lock = threading.Lock()
        self._drawn: WeakKeyDictionary[Model, tuple[_Shown | None, _Shown | None]] = WeakKeyDictionary()

    def scalings(self) -> list[str]:
        """What can be compared: methods, and the adapters of the loaded model with their own scaling."""
        loaded = self._workbench.loaded
        adapters = [] if loaded is None else self._workbench.adapters(loaded)
        return [AS_LOADED, *SCALINGS, *(ADAPTER_MARK + name for name in adapters)]

    def text(self, file: Path | None, pasted: str) -> str:
        """The text to measure on: a dropped file, else pasted text, else what comes with the embedded model.

        Raises:
            RequestError: the file is not text, or too large.
        """
        if file is not None:
            return read_text_file(self._workbench.access.check_upload(file))
        if pasted.strip():
            return pasted
        return (self._workbench.access.open("") / HELD_OUT).read_text(encoding="utf-8")

    def perplexity(
        self,
        visitor: Visitor,
        text: str,
        lengths: str,
        scalings: Sequence[str],
        factor: str,
        max_tokens: float,
    ) -> Iterator[LabView]:
        """Perplexity by length, one curve per scaling. factor: for each of them; empty: longest / original length."""

        def work(progress: Any, cancelled: Any) -> list[Curve]:
            loaded, wanted = self._workbench.require(), read_lengths(lengths)
            if not scalings:
                raise RequestError("choose at least one scaling to measure")
            by = read_factor(factor)
            variants = [self._variant(loaded, name, by, max(wanted)) for name in scalings]
            ids = loaded.tokenizer.encode(text, add_bos=False)
            return compare_perplexity(loaded.model, ids, wanted, variants, int(max_tokens), progress, cancelled)

        def show(curves: list[Curve]) -> _Shown:
            return _shown_curves(curves, self._workbench.require())

        yield from self._follow(visitor, work, show, "perplexity")

    def recommend(self, visitor: Visitor, text: str, length: float | None, max_tokens: float) -> Iterator[LabView]:
        """Measure methods and factors for one length, and say which to take."""

        def work(progress: Any, cancelled: Any) -> Recommendation:
            loaded, wanted = self._workbench.require(), read_length(length)
            ids = loaded.tokenizer.encode(text, add_bos=False)
            return recommend(loaded.model, ids, wanted, max(int(max_tokens), wanted), progress, cancelled)

        def show(found: Recommendation) -> _Shown:
            columns, rows = recommendation_rows(found)
            svg = svg_text(plot_recommendation(found)) if found.measured else ""
            advice = [found.reason[:1].upper() + found.reason[1:]]
            if found.chosen is not None:
                advice += [f"The options: {found.options}", f"The rule: {RULE}."]
            return _Shown(svg, recommendation_csv(found), columns, tuple(rows), tuple(advice))

        yield from self._follow(visitor, work, show, "recommendation")

    def retrieval(
        self, visitor: Visitor, text: str, lengths: str, scaling: str, factor: str, trials: float, task: str = "keys"
    ) -> Iterator[LabView]:
        """Answers found again, by depth and length. task: one of `tasks.TASKS`."""

        def work(progress: Any, cancelled: Any) -> list[RetrievalCell]:
            loaded, wanted = self._workbench.require(), read_lengths(lengths)
            variant = self._variant(loaded, scaling, read_factor(factor), max(wanted))
            model, adapters = open_variant(loaded.model, variant, max(wanted))
            ids = loaded.tokenizer.encode(text, add_bos=False)
            made = make_task(task, loaded.tokenizer, ids, int(trials))
            return retrieval_map(model, made, wanted, DEPTHS, progress, cancelled, adapters)

        def show(cells: list[RetrievalCell]) -> _Shown:
            rows = _cell_rows(cells)
            svg = svg_text(plot_retrieval(cells, scaling)) if rows else ""
            return _Shown(svg, cells_csv(cells), CELL_COLUMNS, rows)

        yield from self._follow(visitor, work, show, "retrieval")

    def folder(self) -> str:
        """Where the loaded model is; what is stored with it is there."""
        loaded = self._workbench.loaded
        return "" if loaded is None else str(loaded.folder)

    def stored(self) -> tuple[LabView | None, LabView | None]:
        """Curves, and maps, that come with the loaded model; None where there are none that can be shown, with the
        reason in the log if they are damaged."""
        loaded = self._workbench.loaded
        if loaded is None:
            return None, None
        with self._lock:  # drawn once, and not for every visitor
            if loaded.model not in self._drawn:
                self._drawn[loaded.model] = _draw_stored(loaded)
            curves, maps = self._drawn[loaded.model]
        return self._stored_view(curves, "perplexity"), self._stored_view(maps, "retrieval")

    def _stored_view(self, shown: _Shown | None, name: str) -> LabView | None:
        if shown is None:
            return None
        path = self._exports / f"{name}-stored.csv"
        path.write_text(shown.table, encoding="utf-8")
        return LabView(Measured(running=False), shown.svg, shown.columns, shown.rows, path, (STORED,))

    def _variant(self, loaded: Loaded, name: str, factor: float | None, longest: int) -> Variant:
        if name.startswith(ADAPTER_MARK):
            folders = self._workbench.access.adapter_folders(loaded.folder)
            adapter = name.removeprefix(ADAPTER_MARK)
            if adapter not in folders:
                raise RequestError(f"there is no adapter {adapter!r} beside this model")
            return adapter_variant(loaded.model, name, folders[adapter])
        if factor is None:
            factor = max(1.0, longest / loaded.model.rope.original_length)
        return scaling_variant(loaded.model, name, factor)

    def _follow(
        self,
        visitor: Visitor,
        work: Any,
        show: Callable[[Any], _Shown],
        name: str,
    ) -> Iterator[LabView]:
        """Views while it runs, then one with plot and table; if it was cancelled, of what was measured until then."""
        measurement = Measurement(work)
        try:
            with self._running.hold(visitor.tab, measurement):
                for measured in measurement.follow():
                    if measured.result is None:
                        yield LabView(measured)
                        continue
                    shown = show(measured.result)
                    path = self._exports / f"{name}-{visitor.tab[:12]}.csv"
                    path.write_text(shown.table, encoding="utf-8")
                    yield LabView(measured, shown.svg, shown.columns, shown.rows, path, shown.advice)
        except RopewalkError as error:
            yield LabView(Measured(running=False, error=str(error)))


def _draw_stored(loaded: Loaded) -> tuple[_Shown | None, _Shown | None]:
    try:
        lab = read_lab(loaded.folder / FOLDER)
    except RopewalkError as error:
        logger.warning("what is stored with %s is not shown: %s", loaded.name, error)
        return None, None
    return _shown_curves(lab.curves, loaded) if lab.curves else None, _shown_maps(lab.maps) if lab.maps else None


def _shown_curves(curves: Sequence[Curve], loaded: Loaded) -> _Shown:
    rows = tuple(
        (curve.name, row.length, with_error(row.perplexity, row.error)) for curve in curves for row in curve.rows
    )
    svg = svg_text(plot_curves(curves, loaded.model.rope.original_length)) if rows else ""
    return _Shown(svg, curves_csv(curves), ("scaling", "length", "perplexity"), rows)


def _shown_maps(maps: Sequence[Map]) -> _Shown:
    """Several maps, one below the other."""
    rows = tuple((one.name, *row) for one in maps for row in _cell_rows(one.cells))
    svg = "".join(svg_text(plot_retrieval(one.cells, one.name)) for one in maps)
    columns = ("scaling", *CELL_COLUMNS)
    return _Shown(svg, csv_text(columns, rows), columns, rows)


def _cell_rows(cells: Sequence[RetrievalCell]) -> tuple[tuple[Any, ...], ...]:
    return tuple((c.length, f"{c.depth:.0%}", f"{c.found:.0%}", f"{c.tokens_found:.0%}") for c in cells)


def read_lengths(text: str) -> list[int]:
    """ "256, 512, 1024" as numbers.

    Raises:
        RequestError: no numbers, or too many.
    """
    try:
        lengths = sorted({int(part) for part in text.replace(",", " ").split()})
    except ValueError as error:
        raise RequestError(
            f"lengths are whole numbers separated by commas, such as 256, 512, 1024; got {text!r:.60}"
        ) from error
    if not 1 <= len(lengths) <= MAX_LENGTHS:
        raise RequestError(f"give from 1 to {MAX_LENGTHS} lengths, got {len(lengths)}")
    return lengths


def read_length(number: float | None) -> int:
    """The context that is wanted, in tokens.

    Raises:
        RequestError: not a whole number within the limits of loading.
    """
    if number is None or not float(number).is_integer() or not 2 <= number <= MAX_SEQ_LEN:
        raise RequestError(
            f"the context wanted is a whole number of tokens from 2 to {MAX_SEQ_LEN}, got {number!r:.60}"
        )
    return int(number)


def read_factor(text: str) -> float | None:
    """A number, or None for an empty text.

    Raises:
        RequestError: it is neither.
    """
    try:
        return float(text) if text.strip() else None
    except ValueError as error:
        raise RequestError(f"the scaling factor is a number such as 4, or empty; got {text!r:.60}") from error
