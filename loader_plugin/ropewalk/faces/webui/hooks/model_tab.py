"""Fields for our settings in the Model tab, shown only for our loader."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.hooks.loader_table import forget_cached_lists, settings_of_others
from ropewalk.faces.webui.parameters import LOADER, PARAMETERS, Choice, Number, Parameter, Slider, name_here
from ropewalk.faces.webui.patching import wrap
from ropewalk.faces.webui.running import webui_module

logger = logging.getLogger(__name__)

# Our fields go beside the first of these that exists: those of the exllama loaders, by the names of all versions.
NEIGHBOURS = ("cache_type", "ctx_size", "max_seq_len", "loader")


def hook_create_ui(menu: ModuleType) -> None:
    """Add our fields after each run of `create_ui`: the page is built anew when it is restarted."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_ui(*args: Any, **options: Any) -> Any:
            components = webui_module("shared").gradio
            before = dict(components)  # after a restart these belong to the page that is gone
            result = original(*args, **options)
            made_now = {name for name, component in components.items() if component is not before.get(name)}
            add_fields(components, made_now)
            return result

        return create_ui

    wrap(menu, "create_ui", make)


def add_fields(components: dict[str, Any], made_by_webui: set[str]) -> None:
    """Make the fields that the page lacks, and name them in the table of loaders so that they are shown.

    If that fails, values without a field take their place: the page looks up all its settings by name.
    """
    import gradio

    loaders = webui_module("loaders")
    of_others = settings_of_others(loaders)
    missing = [item for item in PARAMETERS if name_here(item, of_others) not in made_by_webui]
    try:
        made = _fields_beside(gradio, components, made_by_webui, missing)
        _extend_fields(components, made_by_webui, of_others)
    except Exception:  # the page must come up even without our fields
        logger.exception("ropewalk: the fields could not be added to the Model tab")
        for item in missing:
            components[item.name] = gradio.State(item.default)
        return
    components.update(made)
    names = loaders.loaders_and_params[LOADER]
    names += [name for name in made if name not in names]
    forget_cached_lists(loaders)


def _fields_beside(
    gradio: ModuleType, components: dict[str, Any], made_by_webui: set[str], items: list[Parameter]
) -> dict[str, Any]:
    neighbour = next(components[name] for name in NEIGHBOURS if name in made_by_webui)
    column = neighbour.parent
    while not isinstance(column, gradio.Column):
        column = column.parent
    parent = column.parent
    try:
        with column:  # a block that is entered again appends to what it has
            return {item.name: _field(gradio, item) for item in items}
    finally:
        column.parent = parent  # entering it made the currently open block its parent


def _field(gradio: ModuleType, item: Parameter) -> Any:
    shared = webui_module("shared")
    common = {
        "label": item.name,
        "info": item.info,
        "value": getattr(shared.args, item.name, item.default),
        "visible": shared.args.loader == LOADER,
    }
    widget = item.widget
    if isinstance(widget, Slider):
        return gradio.Slider(minimum=widget.low, maximum=widget.high, step=widget.step, **common)
    if isinstance(widget, Number):
        return gradio.Number(precision=0, **common)
    if isinstance(widget, Choice):
        return gradio.Dropdown(choices=list(widget.choices), allow_custom_value=widget.is_open, **common)
    return gradio.Textbox(**common)


def _extend_fields(components: dict[str, Any], made_by_webui: set[str], of_others: set[str]) -> None:
    """For settings that the web UI has fields for: say there what they mean for us, and add the choices they lack."""
    for item in PARAMETERS:
        name = name_here(item, of_others)
        if name not in made_by_webui:
            continue
        field = components[name]
        field.info = f"{field.info or ''} {LOADER}: {item.info}".strip()
        if isinstance(item.widget, Choice):
            have = {value for _, value in field.choices}
            field.choices += [(choice, choice) for choice in item.widget.choices if choice not in have]


HOOKS = (Hook("the fields in the Model tab", "modules.ui_model_menu", ("create_ui",), hook_create_ui),)
