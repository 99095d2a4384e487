"""The tour tab: a document, questions to click, a switch, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ropewalk.gradio_demo.model_bar.layout import ModelBar
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.events import HIDDEN, visitor
from ropewalk.gradio_demo.shared.pictures import live_line
from ropewalk.gradio_demo.tour.behaviour import OpenTour
from ropewalk.gradio_demo.tour.pictures import answer_picture, document_picture, plots_picture, why_line
from ropewalk.tour.tour import NUM_QUESTIONS

ABOUT = (
    "A document far longer than anything this small model was trained on. **Click a question**; then turn the context "
    "scaling off, and see the same question fail."
)
SWITCH = "And the LoRA that was trained for it. For this page only: nobody else notices."


def build_tour(session: Session, bar: ModelBar, tabs: gr.Tabs, tab: gr.Tab) -> None:
    """Lay it out and connect it. tab: this one, shown while the loaded model has a tour; tabs: all of them."""
    opened = session.tours.current()
    gr.Markdown(ABOUT)
    with gr.Row(equal_height=False, elem_classes=["rw-tour"]):
        with gr.Column(scale=3, min_width=300):
            document = gr.HTML(document_picture(opened, True), elem_id="tour-document", elem_classes=["rw-tight"])
        with gr.Column(scale=2, min_width=300):
            switch = gr.Checkbox(True, label="Context scaling", info=SWITCH, elem_id="tour-switch")
            clicked = [
                gr.Button(text, size="md", elem_id=f"tour-question-{number}", elem_classes=["rw-question"])
                for number, text in enumerate(_questions(opened), 1)
            ]
            answer = gr.HTML(elem_id="tour-answer", elem_classes=["rw-tight"])
            reason = gr.HTML(_why(opened, True), elem_id="tour-why", elem_classes=["rw-tight"])
            line = gr.HTML(elem_id="tour-line", elem_classes=["rw-tight"])
            with gr.Row(equal_height=True):
                own = gr.Textbox(
                    label="Or ask something else", lines=1, scale=4, min_width=160, elem_id="tour-question"
                )
                ask = gr.Button("Ask", scale=1, min_width=70, size="md", elem_id="tour-ask")
    plots = gr.HTML(plots_picture(opened), elem_id="tour-plots", elem_classes=["rw-tight"])
    asked, known = gr.State(""), gr.State(_identity(opened))
    shown = [document, answer, line, reason, asked]
    _connect_asking(session, switch, clicked, own, ask, shown)

    def run_changed(before: str) -> list[Any]:
        now = session.tours.current()
        if _identity(now) == before:
            return [gr.skip()] * (6 + NUM_QUESTIONS + len(shown))
        places = [gr.update(visible=now is not None), gr.update(selected="chat" if now is None else "tour")]
        fresh = [document_picture(now, True), "", "", _why(now, True), ""]
        return [_identity(now), *places, True, plots_picture(now), "", *_questions(now), *fresh]

    bar.changed.change(run_changed, known, [known, tab, tabs, switch, plots, own, *clicked, *shown], **HIDDEN)


def _connect_asking(
    session: Session, switch: gr.Checkbox, clicked: list[gr.Button], own: gr.Textbox, ask: gr.Button, shown: list[Any]
) -> None:
    def run_ask(question: str, is_scaled: bool, request: gr.Request) -> Iterator[list[Any]]:
        for view in session.tours.ask(visitor(request), question, is_scaled):
            said = live_line(view.line, view.running, view.error)
            if view.running or view.error:
                yield [gr.skip(), answer_picture(question, view), said, gr.skip(), question]
                continue
            document = document_picture(session.tours.current(), is_scaled, view.passage)
            yield [document, answer_picture(question, view), said, why_line(view.why), question]

    def run_switch(question: str, is_scaled: bool, request: gr.Request) -> Iterator[list[Any]]:
        """The question that was asked last is asked again, also while it is being answered."""
        question = session.tours.end(visitor(request)) or question  # which the page may not have been told yet
        if question:
            yield from run_ask(question, is_scaled, request)
            return
        opened = session.tours.current()
        yield [document_picture(opened, is_scaled), gr.skip(), gr.skip(), _why(opened, is_scaled), gr.skip()]

    how = {"show_progress": "hidden", "concurrency_limit": None}
    for button in clicked:
        button.click(run_ask, [button, switch], shown, api_visibility="private", **how)
    ask.click(run_ask, [own, switch], shown, api_name="ask_tour", **how)
    switch.input(run_switch, [shown[-1], switch], shown, api_visibility="private", **how)


def _questions(opened: OpenTour | None) -> list[str]:
    return [""] * NUM_QUESTIONS if opened is None else [question.text for question in opened.tour.questions]


def _why(opened: OpenTour | None, is_scaled: bool) -> str:
    return "" if opened is None else why_line(opened.why(is_scaled))


def _identity(opened: OpenTour | None) -> str:
    """What tells tours apart, for a page that is open while the model changes: some have the same title."""
    return "" if opened is None else repr(opened.tour)
