"""The model bar: which folder, with which settings, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ropewalk.base.choices import RECOMPUTE, ROTATE
from ropewalk.base.errors import RopewalkError
from ropewalk.gradio_demo.model_bar.pictures import model_card, note_line, queue_line, status_line
from ropewalk.gradio_demo.model_bar.settings import FIELDS, Field, FieldError, LoadSettings
from ropewalk.gradio_demo.model_bar.workbench import FOLDER
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.access import EMBEDDED
from ropewalk.gradio_demo.shared.events import HIDDEN, Filling, answer_of, visitor
from ropewalk.gradio_demo.shared.pictures import problem

HEAD = '<div class="rw-head"><h1>ropewalk</h1><span>GPTQ models at long context, on this machine</span></div>'
LOOK_S = 2.0  # how often a page asks for news


@dataclass(frozen=True, slots=True)
class ModelBar:
    """The components that other parts of the page listen to."""

    status: gr.HTML
    queue: gr.HTML
    card: gr.HTML
    note: gr.HTML  # why this visitor may not load
    folder: gr.Dropdown
    fields: list[gr.components.Component]
    adapters: gr.Dropdown  # of the requests of this page
    changed: gr.State  # Workbench.generation as this page knows it
    order: gr.State  # the layer order as this page knows it


def build_model_bar(session: Session, page: gr.Blocks) -> ModelBar:
    """Lay it out and connect it."""
    with gr.Column(elem_classes=["rw-top"]):
        queue = gr.HTML(queue_line(session.workbench.loaded), elem_id="queue")
        gr.HTML(HEAD)
        status = gr.HTML(status_line(session.workbench.loaded), elem_id="status")
    changed, order = gr.State(-1), gr.State("")
    with gr.Accordion("Model and how it is loaded", open=False, elem_id="model-bar"), gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280):
            folder, load, unload, message = _folder_row(session)
            note = gr.HTML(elem_id="owner-note", elem_classes=["rw-tight"])
            with gr.Accordion("Or drop a model folder", open=False):
                dropped = gr.File(label="With config.json, tokenizer and weights", file_count="directory", height=160)
            fields = _fields()
            rescaling = _rescale_row()
            adapters = gr.Dropdown(
                [],
                multiselect=True,
                allow_custom_value=True,
                label="Adapters",
                info="LoRAs for the replies of this page, without reloading; storm:0.5 applies one at half weight.",
                elem_id="adapters",
            )
        with gr.Column(scale=2, min_width=260):
            gr.Markdown("**What was decided**")
            card = gr.HTML(model_card(session.workbench.loaded), elem_id="card")
    bar = ModelBar(status, queue, card, note, folder, fields, adapters, changed, order)
    _connect(session, bar, message, load, unload, dropped, page)
    _connect_rescaling(session, bar, *rescaling)
    return bar


def _folder_row(session: Session) -> tuple[gr.Dropdown, gr.Button, gr.Button, gr.HTML]:
    folder = gr.Dropdown(
        session.workbench.access.model_names(),
        value=EMBEDDED,
        allow_custom_value=True,
        label="Model",
        info="Pick one, or type its path below the directory given with --models, or a name on the Hugging Face hub.",
        elem_id="folder",
    )
    message = gr.HTML(elem_id="load-problem")
    with gr.Row():
        load = gr.Button("Load", variant="primary", elem_id="load", min_width=100, size="md")
        unload = gr.Button("Unload", elem_id="unload", min_width=100, size="md")
    return folder, load, unload, message


def _rescale_row() -> tuple[gr.Radio, gr.Button, gr.HTML]:
    """The RoPE of the model that is loaded, changed while conversations are open."""
    with gr.Group(elem_id="rescale-row"):
        mode = gr.Radio(
            [("turn what is cached, at once", ROTATE), ("read conversations again, exactly", RECOMPUTE)],
            value=ROTATE,
            label="Change the RoPE without loading again",
            info="Gives the loaded model the context length and the RoPE fields above; conversations stay open.",
            elem_id="rescale-mode",
        )
        button = gr.Button("Change the RoPE now", size="sm", elem_id="rescale")
    return mode, button, gr.HTML(elem_id="rescale-note", elem_classes=["rw-tight"])


def _connect_rescaling(session: Session, bar: ModelBar, mode: gr.Radio, button: gr.Button, note: gr.HTML) -> None:
    workbench = session.workbench

    def run_rescale(mode: str, request: gr.Request, *values: Any) -> list[Any]:
        named = dict(zip((field.name for field in FIELDS), values, strict=True))
        try:
            loaded = session.loading.rescale(visitor(request), named, mode)
        except RopewalkError as error:
            return [problem(str(error)), gr.skip(), gr.skip(), gr.skip()]
        done = "what was cached is turned to it" if mode == ROTATE else "conversations are read again when they go on"
        text = escape(f"{loaded.model.rope.describe()}; {done}")
        return [f'<div class="rw-line">{text}</div>', status_line(loaded), model_card(loaded), workbench.generation]

    shown = [note, bar.status, bar.card, bar.changed]
    button.click(run_rescale, [mode, *bar.fields], shown, api_name="rescale", show_progress_on=[note])


def _fields() -> list[gr.components.Component]:
    settings = LoadSettings()
    made = []
    with gr.Row(elem_classes=["rw-fields"]):
        for field in FIELDS:
            made.append(_field(field, getattr(settings, field.name)))
    return made


def _field(field: Field, value: Any) -> gr.components.Component:
    common = {"label": field.label, "info": field.info, "min_width": 200, "elem_id": f"field-{field.name}"}
    if field.choices is not None:
        return gr.Dropdown(list(field.choices), value=value, allow_custom_value=field.is_open, **common)
    return gr.Textbox(shown_value(value), lines=1, placeholder=field.placeholder, **common)


def _connect(
    session: Session,
    bar: ModelBar,
    message: gr.HTML,
    load: gr.Button,
    unload: gr.Button,
    dropped: gr.File,
    page: gr.Blocks,
) -> None:
    workbench = session.workbench
    outcome = [message, bar.status, bar.card, bar.changed, *bar.fields]

    def run_load(
        name: str,
        request: gr.Request,
        *values: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        progress(0.0, desc="checking the folder")
        try:
            named = dict(zip((field.name for field in FIELDS), values, strict=True))
            session.loading.load(
                visitor(request), name, named, lambda done, total: progress((done, total), desc="loading layers")
            )
        except RopewalkError as error:
            return [*_problem(error), status_line(workbench.loaded), gr.skip(), gr.skip(), *_field_notes(error)]
        loaded = workbench.loaded
        return ["", status_line(loaded), model_card(loaded), workbench.generation, *_field_notes(None)]

    def run_unload(request: gr.Request) -> list[Any]:
        try:
            session.loading.unload(visitor(request))
        except RopewalkError as error:
            return [*_problem(error), *[gr.skip()] * (len(outcome) - 1)]
        return ["", status_line(None), model_card(None), workbench.generation, *_field_notes(None)]

    def run_look(known: int, order: str, request: gr.Request) -> list[Any]:
        now = [workbench.generation, session.layers.current()]
        seen = [queue_line(workbench.loaded), note_line(session.loading.note(visitor(request)))]
        if now == [known, order]:
            return [*seen, *[gr.skip()] * 4]
        return [*seen, status_line(workbench.loaded), model_card(workbench.loaded), *now]

    def run_suggest(name: str) -> list[Any]:
        try:
            settings = workbench.suggest(name)
        except FieldError as error:
            return [*_problem(error), *[gr.skip()] * len(FIELDS)]
        values = asdict(settings)
        return [
            f"{name.strip()} is not here yet: Load downloads it" if workbench.access.must_be_fetched(name) else "",
            *(gr.update(value=shown_value(values[field.name]), info=field.info, elem_classes=[]) for field in FIELDS),
        ]

    def run_check(name: str, *values: Any) -> list[Any]:
        try:
            workbench.plan(name, dict(zip((field.name for field in FIELDS), values, strict=True)))
        except RopewalkError as error:
            return [*_problem(error), *_field_notes(error)]
        return ["", *_field_notes(None)]

    def run_drop(paths: list[str] | None) -> list[Any]:
        try:
            folder = workbench.access.dropped_folder([Path(path) for path in paths or []])
        except RopewalkError as error:
            return [None, gr.skip(), *_problem(error), *[gr.skip()] * len(FIELDS)]
        return [None, str(folder), *run_suggest(str(folder))]  # emptied, so that the next folder comes alone

    as_built = [component.value for component in (bar.folder, *bar.fields)]
    filling = Filling([bar.folder, *bar.fields])

    def run_page(request: gr.Request) -> list[Any]:
        loaded = workbench.loaded
        shown = as_built if loaded is None else [loaded.name, *map(shown_value, asdict(loaded.settings).values())]
        note = note_line(session.loading.note(visitor(request)))
        return [status_line(loaded), model_card(loaded), note, workbench.generation, answer_of(as_built, shown)]

    def run_adapters(chosen: list[str], before: list[str]) -> list[Any]:
        loaded = workbench.loaded
        names = [] if loaded is None else workbench.adapters(loaded)
        now = [] if loaded is None else workbench.suggested_adapters(loaded)
        kept = [name for name in chosen or [] if name.partition(":")[0] in names]
        return [gr.update(choices=names, value=now if (chosen or []) == before else kept), now]

    suggested = gr.State([])
    bar.changed.change(run_adapters, [bar.adapters, suggested], [bar.adapters, suggested], **HIDDEN)
    load.click(run_load, [bar.folder, *bar.fields], outcome, api_name="load", show_progress_on=[message, bar.card])
    unload.click(run_unload, None, outcome, **HIDDEN)
    watched = [bar.queue, bar.note, bar.status, bar.card, bar.changed, bar.order]
    gr.Timer(LOOK_S).tick(run_look, [bar.changed, bar.order], watched, **HIDDEN)
    filling.after(page.load(run_page, None, [bar.status, bar.card, bar.note, bar.changed, filling.answer], **HIDDEN))
    bar.folder.input(run_suggest, [bar.folder], [message, *bar.fields], **HIDDEN)
    dropped.upload(run_drop, [dropped], [dropped, bar.folder, message, *bar.fields], **HIDDEN)
    for field in bar.fields:
        event = field.input if isinstance(field, gr.Dropdown) else field.blur
        event(run_check, [bar.folder, *bar.fields], [message, *bar.fields], **HIDDEN)


def shown_value(value: Any) -> str:
    """A setting as the text of its field."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _problem(error: RopewalkError) -> list[str]:
    """The text under the folder; empty if the error is shown at another field."""
    at_field = isinstance(error, FieldError) and error.field != FOLDER
    return [problem("" if at_field else str(error))]


def _field_notes(error: RopewalkError | None) -> list[Any]:
    """The text under each label: the explanation, or what is wrong with the value."""
    wrong = error.field if isinstance(error, FieldError) else None
    return [
        gr.update(info=f"✗ {error}", elem_classes=["rw-wrong"])
        if field.name == wrong
        else gr.update(info=field.info, elem_classes=[])
        for field in FIELDS
    ]
