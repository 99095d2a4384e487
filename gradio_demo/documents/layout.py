"""The documents tab: texts on the left, a question and its answer with sources on the right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ropewalk.base.errors import RopewalkError
from ropewalk.gradio_demo.documents.behaviour import HONESTY, Document, chosen_documents, with_documents
from ropewalk.gradio_demo.documents.pictures import count_line, sources_list
from ropewalk.gradio_demo.documents.shelf import Shelf
from ropewalk.gradio_demo.model_bar.layout import ModelBar
from ropewalk.gradio_demo.replies.layout import ReplySettings, request_of
from ropewalk.gradio_demo.replies.pictures import context_meter
from ropewalk.gradio_demo.replies.templates import (
    ALL_TEMPLATES,
    CLOSED_CONTEXT,
    closed_context_template,
    template_names,
)
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.events import HIDDEN, visitor
from ropewalk.gradio_demo.shared.pictures import live_line, problem
from ropewalk.gradio_demo.shared.visitors import Visitor

ABOUT = (
    "The model answers from the texts that you give it and nothing else, in the closed-context format that airoboros "
    "and airophin models were trained on (BEGININPUT, BEGINCONTEXT, …), and the embedded model in its small way, too."
)


def build_documents(session: Session, bar: ModelBar, page: gr.Blocks) -> None:
    """Lay it out and connect it."""
    gr.Markdown(ABOUT)
    state = gr.State([])
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            files = gr.File(
                label="Drop text files here (UTF-8)", file_count="multiple", height=160, elem_id="documents-files"
            )
            with gr.Accordion("Or paste a text", open=False):
                title = gr.Textbox(label="Title", info="How the answer can name it.", elem_id="documents-title")
                with gr.Row():
                    url = gr.Textbox(label="Address", info="Optional.", min_width=120)
                    date = gr.Textbox(label="Date", info="Optional.", min_width=120)
                text = gr.Textbox(
                    label="Text", info="What the answer should come from.", lines=5, elem_id="documents-text"
                )
                add = gr.Button("Add this text", size="sm", elem_id="documents-add")
            listed = gr.CheckboxGroup(
                [], label="Documents", info="The ticked ones are sent with the question.", elem_id="documents-list"
            )
            clear = gr.Button("Remove all", size="sm", elem_id="documents-clear")
            message = gr.HTML(elem_id="documents-message")
            shelf = Shelf(session)
        with gr.Column(scale=1, min_width=320):
            question = gr.Textbox(
                label="Question",
                info="About the ticked documents. Enter asks, Shift+Enter starts a new line.",
                lines=3,
                elem_id="documents-question",
            )
            honest = gr.Checkbox(True, label=f"Add “{HONESTY}”", info="The advice of those models' card.")
            template = gr.Dropdown(
                list(ALL_TEMPLATES), value=CLOSED_CONTEXT, label="Chat template", info="How the question is wrapped."
            )
            settings = ReplySettings("documents", 128, "Precise")
            count = gr.HTML(elem_id="documents-count")
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", min_width=90, size="md", elem_id="documents-ask")
                stop = gr.Button("Stop", min_width=90, size="md")
            answer = gr.Textbox(label="Answer", lines=6, max_lines=20, elem_id="documents-answer")
            line = gr.HTML(elem_id="documents-line")
            meter = gr.HTML()
            sources = gr.HTML(elem_id="documents-sources")
    asking = [state, listed, question, honest, template, *settings.inputs(bar)]
    _connect_list(session, state, listed, message, (files, clear, add), (title, url, date, text))
    shelf.connect(bar, page, state, listed, template, settings)

    def run_model() -> list[Any]:
        loaded = session.workbench.loaded
        if loaded is None:
            return [gr.update(choices=[CLOSED_CONTEXT], value=CLOSED_CONTEXT), True]
        names, suitable = template_names(loaded.tokenizer), closed_context_template(loaded.tokenizer)
        return [gr.update(choices=names, value=suitable), not loaded.is_embedded]  # which knows no such sentence

    renewed = bar.changed.change(run_model, None, [template, honest], **HIDDEN)
    _connect_asking(session, renewed, asking, count, (answer, line, meter, sources), ask, stop)


def _connect_list(session: Session, state: Any, listed: Any, message: Any, buttons: Any, pasted: Any) -> None:
    files, clear, add = buttons

    def added(documents: list[Document], chosen: list[str], new: list[Document]) -> list[Any]:
        documents = with_documents(documents, new)
        names = [document.title for document in documents]
        return [documents, gr.update(choices=names, value=[*chosen, *names[len(names) - len(new) :]]), ""]

    def run_files(paths: list[str] | None, documents: list[Document], chosen: list[str]) -> list[Any]:
        try:
            found = added(documents, chosen, session.documents.read([Path(path) for path in paths or []]))
        except RopewalkError as error:
            return [gr.skip(), gr.skip(), problem(str(error)), None]
        return [*found, None]  # the field is emptied, or it would bring these again next time

    def run_add(documents: list[Document], chosen: list[str], title: str, url: str, date: str, text: str) -> list[Any]:
        if not text.strip():
            return [gr.skip(), gr.skip(), problem("there is no text to add yet"), *[gr.skip()] * 4]
        document = Document(title.strip() or f"text {len(documents) + 1}", text, url.strip(), date.strip())
        try:
            return [*added(documents, chosen, [document]), "", "", "", ""]
        except RopewalkError as error:
            return [gr.skip(), gr.skip(), problem(str(error)), *[gr.skip()] * 4]

    files.upload(run_files, [files, state, listed], [state, listed, message, files], **HIDDEN)
    add.click(run_add, [state, listed, *pasted], [state, listed, message, *pasted], **HIDDEN)
    clear.click(lambda: [[], gr.update(choices=[], value=[]), ""], None, [state, listed, message], **HIDDEN)


def _connect_asking(
    session: Session, renewed: Any, asking: list[Any], count: Any, shown: Any, ask: Any, stop: Any
) -> None:
    def run_count(
        documents: list[Document], chosen: list[str], question: str, honest: bool, template: str, *values: Any
    ) -> str:
        texts = chosen_documents(documents, chosen)
        if not texts:
            return ""
        try:
            params = request_of(session, values).params
            return count_line(session.documents.count(texts, _full(question or "?", honest), template, params))
        except RopewalkError as error:
            return problem(str(error))

    def run_ask(
        documents: list[Document],
        chosen: list[str],
        question: str,
        honest: bool,
        template: str,
        request: gr.Request,
        *values: Any,
    ) -> Iterator[list[Any]]:
        who: Visitor = visitor(request)
        try:
            chat_request = request_of(session, values)
        except RopewalkError as error:
            yield ["", problem(str(error)), "", ""]
            return
        asked = _full(question or "", honest) if (question or "").strip() else ""
        for view in session.documents.ask(who, chosen_documents(documents, chosen), asked, template, chat_request):
            said = live_line(view.line, view.running, view.error is not None)
            yield [view.text, said, context_meter(view.meter), sources_list(view.sources)]

    def run_stop(request: gr.Request) -> None:
        session.running.stop(visitor(request).tab)

    state, listed, question, honest, template, *settings = asking
    # Not any change of the template: while another model brings its own, the old one is sent, which it may not have.
    for event in (listed.change, question.blur, honest.input, template.input, settings[2].release, renewed.then):
        event(run_count, asking, count, **HIDDEN)
    ask.click(run_ask, asking, list(shown), api_name="ask_documents", show_progress="hidden", concurrency_limit=None)
    stop.click(run_stop, None, None, **HIDDEN)


def _full(question: str, honest: bool) -> str:
    return f"{question.strip()} {HONESTY}" if honest else question.strip()
