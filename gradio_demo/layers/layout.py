"""The layers tab: an order as text and as a picture, applied to the loaded model, and compared side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ropewalk.base.errors import RopewalkError
from ropewalk.gradio_demo.layers.behaviour import OrderView
from ropewalk.gradio_demo.layers.pictures import order_picture
from ropewalk.gradio_demo.model_bar.layout import ModelBar
from ropewalk.gradio_demo.model_bar.pictures import model_card
from ropewalk.gradio_demo.replies.layout import ReplySettings, request_of
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.events import HIDDEN, Filling, answer_of, visitor
from ropewalk.gradio_demo.shared.pictures import live_line, problem
from ropewalk.text.example import EXAMPLE

ABOUT = (
    "A model runs a list of layers. Here that list can be changed: layers repeated, left out or weakened. No weight is "
    "copied; each repetition costs time and cache. Applying an order changes the model for everybody on this page."
)


def build_layers(session: Session, bar: ModelBar) -> None:
    """Lay it out and connect it."""
    lab = session.layers
    gr.Markdown(ABOUT)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            order = gr.Textbox(
                lab.current(),
                label="Layer order",
                info="0-3,2-4 repeats layers 2 and 3; 2*3@0.5 runs layer 2 three times at half strength.",
                elem_id="order",
            )
            picture = gr.HTML(order_picture(lab.view(lab.current())), elem_id="order-picture")
        with gr.Column(scale=2, min_width=260):
            with gr.Row():
                recompute = gr.Number(4, precision=0, label="Run layers", info="This many in a row,", min_width=110)
                rewind = gr.Number(2, precision=0, label="Go back", info="then this many back.", min_width=110)
            with gr.Row():
                fill = gr.Button("Write that order", size="sm", min_width=110, elem_id="order-fill")
                reset = gr.Button("Order of the files", size="sm", min_width=110, elem_id="order-reset")
            apply = gr.Button("Apply to the loaded model", variant="primary", elem_id="order-apply")
            applied = gr.HTML(elem_id="order-applied")
    gr.Markdown("**Side by side:** the same prompt and the same seed, in the current order and in the one above.")
    prompt = gr.Textbox(EXAMPLE, label="Prompt", info="Both orders continue it.", lines=2, elem_id="order-prompt")
    settings = ReplySettings("order", 64, "Most likely")
    with gr.Row():
        compare = gr.Button("Compare", min_width=90, size="md", elem_id="order-compare")
        stop = gr.Button("Stop", min_width=90, size="md")
    line = gr.HTML(elem_id="order-line")
    with gr.Row():
        before = gr.Textbox(label="As the model runs now", lines=8, max_lines=16, min_width=280, elem_id="order-before")
        after = gr.Textbox(label="In the order above", lines=8, max_lines=16, min_width=280, elem_id="order-after")

    def run_view(text: str) -> str:
        return order_picture(lab.view(text or ""))

    written = gr.State(lab.current())  # what the page itself last wrote into the field
    filling = Filling([order])

    def run_current(before: str) -> list[Any]:
        now = lab.current()
        return [now, answer_of([before], [now])]

    def run_fill(count: float | None, back: float | None) -> list[Any]:
        try:
            text = lab.rewind(count, back)
        except RopewalkError as error:
            return [gr.skip(), order_picture(OrderView(error=str(error)))]
        return [text, order_picture(lab.view(text))]

    def run_apply(text: str, request: gr.Request) -> list[Any]:
        view = lab.apply(visitor(request), text or "")
        if view.error is not None:
            shown = lab.view(text or "")
            said = "Nothing was changed." if shown.error is not None else f"Nothing was changed: {view.error}."
            return [gr.skip(), gr.skip(), order_picture(shown), problem(said), gr.skip()]
        said = live_line(f"The model now runs {view.canonical}.", False, False)
        card = model_card(session.workbench.loaded)
        return [view.canonical, answer_of([text], [view.canonical]), order_picture(view), said, card]

    def run_compare(text: str, start: str, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        try:
            params = request_of(session, values).params
        except RopewalkError as error:
            yield [gr.skip(), gr.skip(), problem(str(error))]
            return
        for pair in lab.compare(visitor(request), text or "", start or "", params):
            yield [pair.before, pair.after, live_line(pair.line, pair.running, pair.error is not None)]

    def run_stop(request: gr.Request) -> None:
        session.running.stop(visitor(request).tab)

    order.change(run_view, order, picture, **HIDDEN)
    fill.click(run_fill, [recompute, rewind], [order, picture], **HIDDEN)
    reset.click(lambda: ["", run_view("")], None, [order, picture], **HIDDEN)
    told = [written, filling.answer, picture, applied, bar.card]
    filling.after(apply.click(run_apply, order, told, api_name="apply_order", show_progress="hidden"))
    compare.click(run_compare, [order, prompt, *settings.inputs(bar)], [before, after, line], **HIDDEN)
    stop.click(run_stop, None, None, **HIDDEN)
    filling.after(bar.order.change(run_current, written, [written, filling.answer], **HIDDEN))
