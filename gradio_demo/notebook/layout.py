"""The notebook tab: a text and its continuation, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ropewalk.base.errors import RopewalkError
from ropewalk.gradio_demo.model_bar.layout import ModelBar
from ropewalk.gradio_demo.notebook.pictures import token_view
from ropewalk.gradio_demo.replies.layout import ReplySettings, request_of
from ropewalk.gradio_demo.replies.pictures import context_meter
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.events import HIDDEN, visitor
from ropewalk.gradio_demo.shared.pictures import live_line
from ropewalk.text.example import EXAMPLE


def build_notebook(session: Session, bar: ModelBar) -> None:
    """Lay it out and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            text = gr.Textbox(
                EXAMPLE,
                label="Text",
                info="The model continues it from its end: no roles, no template. Ctrl+Enter starts.",
                lines=16,
                max_lines=16,
                elem_id="notebook-text",
            )
            settings = ReplySettings("notebook", 96)
            with gr.Row():
                go = gr.Button("Continue", variant="primary", min_width=90, size="md", elem_id="notebook-go")
                stop = gr.Button("Stop", min_width=90, size="md", elem_id="notebook-stop")
            line = gr.HTML(live_line("", False, False), elem_id="notebook-line")
            meter = gr.HTML(elem_id="notebook-meter")
        with gr.Column(scale=1, min_width=320):
            tokens = gr.HTML(token_view(()), elem_id="notebook-tokens", container=True, padding=True)

    def run(prompt: str, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        try:
            chat_request = request_of(session, values)
        except RopewalkError as error:
            yield [gr.skip(), gr.skip(), live_line(str(error), False, True), gr.skip()]
            return
        for view in session.notebook.complete(visitor(request), prompt or "", chat_request):
            shown = live_line(view.line, view.running, view.error is not None)
            yield [view.text, token_view(view.tokens), shown, context_meter(view.meter)]

    def run_stop(request: gr.Request) -> None:
        session.running.stop(visitor(request).tab)

    go.click(
        run,
        [text, *settings.inputs(bar)],
        [text, tokens, line, meter],
        api_name="complete",
        show_progress="hidden",
        concurrency_limit=None,
    )
    stop.click(run_stop, None, None, **HIDDEN)
