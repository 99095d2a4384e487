"""The controls beside the chat: conversations, and the settings of replies."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ropewalk.gradio_demo.model_bar.layout import ModelBar
from ropewalk.gradio_demo.replies.request import OVERFLOW_POLICIES, ReplyRequest
from ropewalk.gradio_demo.replies.sampler_settings import BALANCED, PRESETS, SLIDERS, sampling_params
from ropewalk.gradio_demo.replies.templates import ALL_TEMPLATES, template_names
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.events import HIDDEN


class ConversationControls:
    """The list of conversations and what can be done with the open one."""

    def __init__(self) -> None:
        with gr.Group():
            self.chosen = gr.Dropdown(
                [],
                label="Conversations",
                info="Kept on this computer. Pick one to continue it.",
                elem_id="conversations",
            )
        with gr.Row():
            self.new = gr.Button("New", size="sm", min_width=60, elem_id="new")
            self.export = gr.Button("Export", size="sm", min_width=60, elem_id="export")
            self.import_ = gr.UploadButton("Import", size="sm", min_width=60, file_types=[".json"], elem_id="import")
            self.delete = gr.Button("Delete …", size="sm", min_width=60, elem_id="delete")
        with gr.Column(visible=False, variant="panel", elem_id="delete-question") as self.question:
            self.asked = gr.HTML(padding=False)
            with gr.Row():
                self.confirm = gr.Button("Delete it", size="sm", variant="stop", min_width=60, elem_id="delete-confirm")
                self.keep = gr.Button("Keep it", size="sm", min_width=60, elem_id="delete-keep")
        self.doomed = gr.State(None)  # the conversation that the question is about


class ReplyControls:
    """How replies are made."""

    def __init__(self, session: Session) -> None:
        with gr.Accordion("Reply", open=True):
            self.preset = gr.Radio(
                list(PRESETS), value=BALANCED, label="Preset", info="Sets the sliders under Sampling.", elem_id="preset"
            )
            self.max_new_tokens = gr.Slider(
                8,
                2048,
                128,
                step=8,
                label="Longest reply",
                info="In tokens; a token is about four letters.",
                elem_id="max-new-tokens",
            )
            self.template = gr.Dropdown(
                list(ALL_TEMPLATES),
                value=None,
                label="Chat template",
                info="How turns are written for the model.",
                elem_id="template",
            )
            self.system = gr.Textbox(
                label="System prompt", info="Given to the model before the conversation.", lines=2, elem_id="system"
            )
        with gr.Accordion("Sampling", open=False):
            values = PRESETS[BALANCED]
            self.sliders = [
                gr.Slider(low, high, values[name], step=step, label=label, info=info, elem_id=f"sampler-{name}")
                for name, label, low, high, step, info in SLIDERS
            ]
            self.seed = gr.Textbox(
                label="Seed",
                placeholder="fresh",
                info="The same number gives the same reply again.",
                elem_id="seed",
            )
        with gr.Accordion("Context and Markdown", open=False):
            self.overflow = gr.Radio(
                list(OVERFLOW_POLICIES),
                value=OVERFLOW_POLICIES[0],
                label="When the context is full",
                info="What to do with a conversation that outgrew it.",
                elem_id="overflow",
            )
            self.markdown = gr.Checkbox(
                False, label="Show replies as Markdown", info="For models that write it; code models do not."
            )

    def inputs(self, bar: ModelBar) -> list[gr.components.Component]:
        """What a reply depends on, in the order of `read_controls`."""
        return [
            self.system,
            self.template,
            self.overflow,
            bar.adapters,
            self.max_new_tokens,
            self.seed,
            *self.sliders,
        ]

    def connect(self, session: Session, bar: ModelBar, chatbot: gr.Chatbot) -> None:
        """Presets move the sliders; another model brings other templates."""
        self.preset.input(
            lambda name: [PRESETS[name][slider[0]] for slider in SLIDERS], self.preset, self.sliders, **HIDDEN
        )
        self.markdown.change(
            lambda on: gr.update(render_markdown=on, elem_classes=[] if on else ["rw-plain"]),
            self.markdown,
            chatbot,
            **HIDDEN,
        )

        def choices(current: str | None) -> Any:
            return template_choices(session, current)

        bar.changed.change(choices, self.template, self.template, **HIDDEN)


def read_controls(session: Session, values: tuple[Any, ...]) -> tuple[str, str, ReplyRequest]:
    """(system text, template, request) of `ReplyControls.inputs`."""
    system, template, overflow, adapters, max_new_tokens, seed, *sliders = values
    named = dict(zip((slider[0] for slider in SLIDERS), sliders, strict=True))
    params = sampling_params(named, max_new_tokens, seed)
    wanted = session.workbench.use_adapters(session.workbench.require(), adapters or [])
    return system or "", template or "", ReplyRequest(params, overflow, wanted)


def template_choices(session: Session, wanted: str | None) -> Any:
    """The choices of the loaded model with `wanted` picked, if it is one of them, else the one that suits best."""
    loaded = session.workbench.loaded
    names = [] if loaded is None else template_names(loaded.tokenizer)
    return gr.update(choices=names, value=wanted if wanted in names else next(iter(names), None))
