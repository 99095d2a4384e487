"""The model bar: which folder, with which settings, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ropewalk.errors import RopewalkError
from ropewalk.gradio_demo.access import EMBEDDED
from ropewalk.gradio_demo.load_settings import FIELDS, Field, FieldError, LoadSettings
from ropewalk.gradio_demo.pictures import model_card, problem, status_line
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.tabs.shared import HIDDEN
from ropewalk.gradio_demo.workbench import FOLDER


@dataclass(frozen=True, slots=True)
class ModelBar:
    """The components that other parts of the page listen to."""

    status: gr.HTML
    card: gr.HTML
    folder: gr.Dropdown
    fields: list[gr.components.Component]
    changed: gr.State  # counts loads and unloads


def build_model_bar(session: Session) -> ModelBar:
    """Lay it out and connect it."""
    status = gr.HTML(status_line(session.workbench.loaded), elem_id="status")
    changed = gr.State(0)
    with gr.Accordion("Model: load another, or change how it is loaded", open=False, elem_id="model-bar"):
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=280):
                folder, load, unload, message = _folder_row(session)
                dropped = gr.File(
                    label="Or drop a model folder here (config.json, tokenizer, safetensors)",
                    file_count="directory",
                    height=96,
                )
                fields = _fields()
            with gr.Column(scale=2, min_width=260):
                gr.Markdown("**What was decided**")
                card = gr.HTML(model_card(session.workbench.loaded), elem_id="card")
    bar = ModelBar(status, card, folder, fields, changed)
    _connect(session, bar, message, load, unload, dropped)
    return bar


def _folder_row(session: Session) -> tuple[gr.Dropdown, gr.Button, gr.Button, gr.HTML]:
    folder = gr.Dropdown(
        session.workbench.access.model_names(),
        value=EMBEDDED,
        allow_custom_value=True,
        label="Model folder",
        info="Pick one, or type its path below the directory given with --models.",
        elem_id="folder",
    )
    message = gr.HTML(elem_id="load-problem")
    with gr.Row():
        load = gr.Button("Load", variant="primary", elem_id="load", min_width=100)
        unload = gr.Button("Unload", elem_id="unload", min_width=100)
    return folder, load, unload, message


def _fields() -> list[gr.components.Component]:
    settings = LoadSettings()
    made = []
    with gr.Row():
        for field in FIELDS:
            made.append(_field(field, getattr(settings, field.name)))
    return made


def _field(field: Field, value: Any) -> gr.components.Component:
    common = {"label": field.label, "info": field.info, "min_width": 200, "elem_id": f"field-{field.name}"}
    if field.choices is not None:
        return gr.Dropdown(list(field.choices), value=value, **common)
    return gr.Number(value, **common) if field.is_number else gr.Textbox(value, lines=1, **common)


def _connect(
    session: Session, bar: ModelBar, message: gr.HTML, load: gr.Button, unload: gr.Button, dropped: gr.File
) -> None:
    workbench = session.workbench
    outcome = [message, bar.status, bar.card, bar.changed, *bar.fields]

    def run_load(name: str, changed: int, *values: Any, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        progress(0.0, desc="checking the folder")
        try:
            named = dict(zip((field.name for field in FIELDS), values, strict=True))
            workbench.load(name, named, lambda done, total: progress((done, total), desc="loading layers"))
        except RopewalkError as error:
            return [*_problem(error), status_line(workbench.loaded), gr.skip(), changed, *_field_notes(error)]
        loaded = workbench.loaded
        return ["", status_line(loaded), model_card(loaded), changed + 1, *_field_notes(None)]

    def run_unload(changed: int) -> list[Any]:
        workbench.unload()
        return ["", status_line(None), model_card(None), changed + 1, *_field_notes(None)]

    def run_suggest(name: str) -> list[Any]:
        try:
            settings = workbench.suggest(name)
        except FieldError as error:
            return [*_problem(error), *[gr.skip()] * len(FIELDS)]
        return ["", *(gr.update(value=asdict(settings)[field.name], info=field.info) for field in FIELDS)]

    def run_check(name: str, *values: Any) -> list[Any]:
        try:
            workbench.plan(name, dict(zip((field.name for field in FIELDS), values, strict=True)))
        except RopewalkError as error:
            return [*_problem(error), *_field_notes(error)]
        return ["", *_field_notes(None)]

    def run_drop(paths: list[str] | None) -> list[Any]:
        if not paths:
            return [gr.skip(), gr.skip()]
        root = Path(paths[0]).parent
        try:
            session.workbench.access.check_upload(root)
        except RopewalkError as error:
            return [gr.skip(), *_problem(error)]
        return [gr.update(value=str(root)), ""]

    load.click(
        run_load, [bar.folder, bar.changed, *bar.fields], outcome, api_name="load", show_progress_on=[message, bar.card]
    )
    unload.click(run_unload, [bar.changed], outcome, **HIDDEN)
    bar.folder.change(run_suggest, [bar.folder], [message, *bar.fields], **HIDDEN)
    dropped.upload(run_drop, [dropped], [bar.folder, message], **HIDDEN)
    for field in bar.fields:
        event = field.input if isinstance(field, gr.Dropdown) else field.blur
        event(run_check, [bar.folder, *bar.fields], [message, *bar.fields], **HIDDEN)


def _problem(error: RopewalkError) -> list[str]:
    """The text under the folder; empty where the mistake stands at another field."""
    at_field = isinstance(error, FieldError) and error.field != FOLDER
    return [problem("" if at_field else str(error))]


def _field_notes(error: RopewalkError | None) -> list[Any]:
    """What stands under each label: the explanation, or what is wrong with the value."""
    wrong = error.field if isinstance(error, FieldError) else None
    return [
        gr.update(info=f"✗ {error}", elem_classes=["rw-wrong"])
        if field.name == wrong
        else gr.update(info=field.info, elem_classes=[])
        for field in FIELDS
    ]
