"""The settings that every tab with replies shares: length, preset, seed."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ropewalk.gradio_demo.model_bar.layout import ModelBar
from ropewalk.gradio_demo.replies.request import ReplyRequest
from ropewalk.gradio_demo.replies.sampler_settings import BALANCED, PRESETS, sampling_params
from ropewalk.gradio_demo.session import Session


class ReplySettings:
    """Three controls. name: the tab's, which keeps its element ids apart from those of other tabs."""

    def __init__(self, name: str, longest: int, preset: str = BALANCED) -> None:
        with gr.Group():
            with gr.Row():
                self.preset = gr.Dropdown(
                    list(PRESETS),
                    value=preset,
                    label="Preset",
                    info="How bold the choice of tokens is.",
                    elem_id=f"{name}-preset",
                    min_width=140,
                )
                self.seed = gr.Textbox(
                    label="Seed",
                    placeholder="fresh",
                    info="The same number gives the same text.",
                    elem_id=f"{name}-seed",
                    min_width=140,
                )
            self.max_new_tokens = gr.Slider(
                8, 1024, longest, step=8, label="Longest reply", info="In tokens.", elem_id=f"{name}-length"
            )

    def inputs(self, bar: ModelBar) -> list[gr.components.Component]:
        """In the order of `request_of`."""
        return [bar.adapters, self.preset, self.max_new_tokens, self.seed]


def request_of(session: Session, values: tuple[Any, ...]) -> ReplyRequest:
    """What `ReplySettings.inputs` ask for.

    Raises:
        RequestError: a value is out of range, no such adapter, or no model. Others as `Model.load_adapter`.
    """
    adapters, preset, max_new_tokens, seed = values
    wanted = session.workbench.use_adapters(session.workbench.require(), adapters or [])
    return ReplyRequest(sampling_params(PRESETS[preset], max_new_tokens, seed), adapters=wanted)
