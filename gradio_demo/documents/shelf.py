"""The part of the documents tab where documents are kept that were read once, and taken up again."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ropewalk.base.errors import RopewalkError
from ropewalk.base.memory import format_bytes
from ropewalk.gradio_demo.documents.behaviour import Document, chosen_documents, with_documents
from ropewalk.gradio_demo.documents.kept import KeptDocuments
from ropewalk.gradio_demo.model_bar.layout import ModelBar
from ropewalk.gradio_demo.replies.layout import ReplySettings, request_of
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.events import HIDDEN, visitor
from ropewalk.gradio_demo.shared.pictures import live_line, problem

ABOUT = (
    "Reading takes most of the time of an answer. What is kept is not read again, not even after a restart: it lies in "
    "<code>{folder}</code> of the machine that runs this page, {limit} at most, and what was not used for the longest "
    "time goes first."
)


class Shelf:
    """Its fields, laid out where it is made."""

    def __init__(self, session: Session) -> None:
        self._session = session
        folder = session.shelf.folder
        with gr.Accordion("Read once, and keep", open=False, elem_id="documents-shelf") as self.box:
            about = ABOUT.format(folder=escape(_short(folder.folder)), limit=format_bytes(folder.most_bytes))
            gr.HTML(f'<p class="rw-line">{about}</p>')
            with gr.Row():
                self.keep = gr.Button("Keep the ticked ones", size="sm", min_width=90, elem_id="documents-keep")
                self.stop = gr.Button("Stop", size="sm", min_width=90, elem_id="documents-keep-stop")
            self.line = gr.HTML(elem_id="documents-keep-line")
            self.kept = gr.Dropdown(
                [], value=None, label="Kept", info="Choosing puts them on the list, ticked.", elem_id="documents-kept"
            )
            self.forget = gr.Button("Forget what is chosen", size="sm", elem_id="documents-forget")

    def connect(
        self, bar: ModelBar, page: gr.Blocks, state: Any, listed: Any, template: Any, settings: ReplySettings
    ) -> None:
        """Connect them with the list of documents."""
        self._connect_keeping([state, listed, template, *settings.inputs(bar)])
        self._connect_choosing(bar, page, state, listed, template)

    def _connect_keeping(self, asking: list[Any]) -> None:
        session = self._session

        def run_keep(
            documents: list[Document], ticked: list[str], template: str, request: gr.Request, *values: Any
        ) -> Iterator[list[Any]]:
            who = visitor(request)
            try:
                wanted = request_of(session, values)
            except RopewalkError as error:
                yield [problem(str(error)), gr.skip()]
                return
            for view in session.shelf.keep(who, chosen_documents(documents, ticked), template, wanted):
                choices = gr.skip() if view.name is None else self._choices(request, view.name)
                yield [live_line(view.line, view.running, view.error), choices]

        def run_stop(request: gr.Request) -> None:
            session.running.stop(visitor(request).tab)

        self.keep.click(
            run_keep,
            asking,
            [self.line, self.kept],
            show_progress="hidden",
            api_visibility="private",
            concurrency_limit=None,
        )
        self.stop.click(run_stop, None, None, **HIDDEN)

    def _connect_choosing(self, bar: ModelBar, page: gr.Blocks, state: Any, listed: Any, template: Any) -> None:
        session = self._session

        def run_choose(name: str | None, documents: list[Document], request: gr.Request) -> list[Any]:
            if not name:
                return [gr.skip(), gr.skip(), gr.skip(), ""]
            try:
                found, wrapped = session.shelf.open(visitor(request), name)
                documents = with_documents(found, [document for document in documents if document not in found])
            except RopewalkError as error:
                return [gr.skip(), gr.skip(), gr.skip(), problem(str(error))]
            titles = [document.title for document in found]
            names = [document.title for document in documents]  # kept ones first, as they were read
            line = live_line("on the list, and not read again", False, False)
            return [documents, gr.update(choices=names, value=titles), wrapped, line]

        def run_forget(name: str | None, request: gr.Request) -> list[Any]:
            if not name:
                return [gr.skip(), problem("choose what to forget first")]
            try:
                session.shelf.forget(visitor(request), name)
            except RopewalkError as error:
                return [self._choices(request), problem(str(error))]
            return [self._choices(request), live_line("forgotten", False, False)]

        chosen = [state, listed, template, self.line]
        self.kept.input(run_choose, [self.kept, state], chosen, **HIDDEN)
        self.forget.click(run_forget, self.kept, [self.kept, self.line], **HIDDEN)

        def run_page(request: gr.Request) -> list[Any]:
            choices = self._choices(request)
            return [choices, gr.update(open=bool(choices["choices"]))]  # what is kept is offered to who comes back

        page.load(run_page, None, [self.kept, self.box], **HIDDEN)

        def run_other_model(chosen: str | None, request: gr.Request) -> Any:
            return self._choices(request, chosen)  # what is kept fits one model in one order

        for event in (bar.changed.change, bar.order.change):
            event(run_other_model, self.kept, self.kept, **HIDDEN)

    def _choices(self, request: gr.Request, name: str | None = None) -> Any:
        """What the visitor can choose now; `name` is chosen, if it is among that."""
        try:
            entries = self._session.shelf.list(visitor(request))
        except RopewalkError as error:
            return gr.update(choices=[], value=None, info=str(error))
        usable = [(_shown(entry), entry.name) for entry in entries if entry.problem is None]
        others = len(entries) - len(usable)
        more = f" {others} more were kept with another model or other settings." if others else ""
        info = f"Choosing puts them on the list, ticked.{more}"
        return gr.update(choices=usable, value=name if name in dict(usable).values() else None, info=info)


def _short(folder: Path) -> str:
    """With ~ for the home folder."""
    home = Path.home()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def _shown(entry: KeptDocuments) -> str:
    title = entry.title if len(entry.title) <= 60 else entry.title[:57] + "..."
    return f"{title} · {entry.num_tokens:,} tokens · {format_bytes(entry.num_bytes)}"
