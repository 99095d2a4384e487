"""The tour of the loaded model: its document, its questions, and what the model says with its scaling and without.

Visitors turn the scaling on and off for themselves: both ways to read share the weights of the model that is loaded, so
nothing is reloaded and nobody's conversation changes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.gradio_demo.model_bar.workbench import Loaded, Workbench
from ropewalk.gradio_demo.replies.reply import DONE, start_reply
from ropewalk.gradio_demo.replies.running import BUSY, PATIENCE_S, Running
from ropewalk.gradio_demo.replies.status import describe
from ropewalk.gradio_demo.shared.visitors import Visitor
from ropewalk.measure.plots import plot_curves, plot_retrieval, svg_text
from ropewalk.measure.stored import read_lab
from ropewalk.model.model import Model
from ropewalk.tour.explanation import trained_part, why
from ropewalk.tour.readers import Readers, is_right, open_readers
from ropewalk.tour.tour import FOLDER, Tour, read_tour

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenTour:
    """The tour of a loaded model. trained: how many characters of the document the training was as long as; plots: what
    is stored with it, as SVG."""

    tour: Tour
    readers: Readers
    trained: int
    plots: tuple[str, ...]

    def why(self, is_scaled: bool, num_tokens: int | None = None) -> str:
        """See `explanation.why`; without a number it is about the document alone."""
        return why(self.tour, self.readers, is_scaled, num_tokens or self.tour.measured.tokens)


@dataclass(frozen=True, slots=True)
class AnswerView:
    """An answer at one moment. right: None for a question that is not the tour's, or not answered yet; then there is no
    expected answer and no passage either. why: what the answer rests on."""

    text: str
    line: str
    running: bool
    right: bool | None = None
    expected: str = ""
    passage: str = ""
    why: str = ""
    error: bool = False


class _Asked:
    """A question while it is being answered, from before its prompt is made."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_ended = False
        self.over = threading.Event()


class Tours:
    """Tours of the models that are loaded, each opened once."""

    def __init__(self, workbench: Workbench, running: Running) -> None:
        self._workbench = workbench
        self._running = running
        self._lock = threading.Lock()
        self._asked: dict[str, _Asked] = {}  # by tab
        self._opened: WeakKeyDictionary[Model, OpenTour | None] = WeakKeyDictionary()  # for as long as it is loaded

    def current(self) -> OpenTour | None:
        """The tour of the loaded model; None if it has none that can be shown, with the reason in the log."""
        loaded = self._workbench.loaded
        if loaded is None:
            return None
        with self._lock:
            if loaded.model not in self._opened:
                try:
                    self._opened[loaded.model] = _open(loaded)
                except RopewalkError as error:
                    logger.warning("there is no tour of %s: %s", loaded.name, error)
                    self._opened[loaded.model] = None
            return self._opened[loaded.model]

    def ask(self, visitor: Visitor, question: str, is_scaled: bool) -> Iterator[AnswerView]:
        """The answer to a question about the document, view by view; no more of them once it has been ended."""
        asked: _Asked | None = None
        try:
            answer = self._answer(visitor, question, is_scaled)
            with self._noted(visitor.tab, question) as asked, closing(answer):
                for view in answer:
                    if asked.is_ended:
                        return
                    yield view
        except RopewalkError as error:
            if asked is None or not asked.is_ended:
                yield AnswerView("", str(error), False, error=True)

    def end(self, visitor: Visitor) -> str:
        """End the answer that is being written in this tab, or about to be. Returns its question; without one, ""."""
        asked = self._asked.get(visitor.tab)
        if asked is None:
            return ""
        asked.is_ended = True
        self._running.stop(visitor.tab)
        asked.over.wait(PATIENCE_S)
        return asked.text

    def _answer(self, visitor: Visitor, question: str, is_scaled: bool) -> Iterator[AnswerView]:
        opened = self.current()
        if opened is None:
            raise RequestError("the model that is loaded brings no tour: load the embedded model")
        if not isinstance(question, str) or not question.strip():
            raise RequestError("write a question first, or click one")
        reader = opened.readers.reader(is_scaled)
        ids = reader.prompt_ids(opened.tour.document, question)
        reply = start_reply(reader.engine, ids, reader.params, reader.adapters or (), visitor.person)
        with self._running.hold(visitor.tab, reply):
            for snapshot in reply.follow():
                text, line = snapshot.text.strip(), describe(snapshot)
                if snapshot.phase != DONE or snapshot.error is not None:
                    yield AnswerView(text, line, snapshot.phase != DONE, error=snapshot.error is not None)
                    continue
                reason, asked = opened.why(is_scaled, len(ids)), opened.tour.question(question)
                if asked is None:
                    yield AnswerView(text, line, False, why=reason)
                else:
                    verdict = is_right(asked, text)
                    yield AnswerView(text, line, False, verdict, asked.answer, asked.passage, reason)

    @contextmanager
    def _noted(self, tab: str, question: str) -> Iterator[_Asked]:
        """Count a question as what this tab asks, within this context.

        Raises:
            RequestError: the answer to another one is being written.
        """
        asked = _Asked(question)
        if self._asked.setdefault(tab, asked) is not asked:
            raise RequestError(BUSY)
        try:
            yield asked
        finally:
            del self._asked[tab]
            asked.over.set()


def _open(loaded: Loaded) -> OpenTour | None:
    tour = read_tour(loaded.folder)
    if tour is None:
        return None
    readers = open_readers(tour, loaded.folder, loaded.model, loaded.tokenizer, loaded.engine.queue.num_turns)
    trained = trained_part(tour, loaded.tokenizer, readers.plain.rope)
    lab, original = read_lab(loaded.folder / FOLDER), readers.plain.rope.original_length
    figures = [plot_curves(lab.curves, original)] if lab.curves else []
    figures += [plot_retrieval(one.cells, one.name) for one in lab.maps]
    return OpenTour(tour, readers, trained, tuple(map(svg_text, figures)))
