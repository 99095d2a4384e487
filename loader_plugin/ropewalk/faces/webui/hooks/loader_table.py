"""Our loader in the list of loaders, with its samplers and the names of its settings."""

from __future__ import annotations

import sys
from types import ModuleType

from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.parameters import BORROWED, LOADER, PARAMETERS, name_here
from ropewalk.faces.webui.patching import HookError, is_patched, wrap
from ropewalk.faces.webui.running import webui_module

# Our model samples through transformers, like these.
LIKE_OURS = ("ExLlamav3_HF", "ExLlamav2_HF", "Transformers")
MORE_SAMPLERS = {"prompt_lookup_num_tokens"}  # which the exllama loaders do not have


def settings_of_others(loaders: ModuleType) -> set[str]:
    """The settings that this version has without ours."""
    return {name for loader, names in loaders.loaders_and_params.items() if loader != LOADER for name in names}


def add_loader(loaders: ModuleType) -> None:
    """Add the loader with the settings that the page has fields for; `model_tab` adds the others with their fields."""
    own = settings_of_others(loaders)
    names = [name_here(item, own) for item in PARAMETERS]
    loaders.loaders_and_params.setdefault(LOADER, [name for name in (*names, *BORROWED) if name in own])
    alike = next((name for name in LIKE_OURS if name in loaders.loaders_samplers), None)
    if alike is None:
        raise HookError(f"{loaders.__name__}.loaders_samplers has none of {', '.join(LIKE_OURS)}")
    more = MORE_SAMPLERS & loaders.loaders_samplers.get("Transformers", set())
    loaders.loaders_samplers.setdefault(LOADER, loaders.loaders_samplers[alike] | more)
    forget_cached_lists(loaders)


def forget_cached_lists(loaders: ModuleType) -> None:
    """Drop the cached lists that were made from the tables, so that they are made anew."""
    for name in ("get_all_params", "list_all_samplers"):
        clear = getattr(getattr(loaders, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def extend_elements(module: ModuleType) -> None:
    """Add ours to the list of model settings, which are read from the page, saved, and allowed in the API."""
    if not hasattr(module, "list_model_elements"):
        return  # it moved from modules.ui to modules.loaders in v4.1
    wrap(
        module,
        "list_model_elements",
        lambda original: lambda: [*(names := list(original())), *(name for name in our_names() if name not in names)],
    )


def our_names() -> list[str]:
    """Our settings by their names in this version; with a page, only those that it has fields for."""
    loaders = sys.modules["modules.loaders"]
    own, menu = settings_of_others(loaders), sys.modules.get("modules.ui_model_menu")
    names = [name_here(item, own) for item in PARAMETERS]
    if menu is None or is_patched(getattr(menu, "create_ui", None)):
        return names
    return [name for name in names if name in own]


def check_elements(ui: ModuleType) -> None:
    """`extend_elements` for modules.ui, where older versions have the list."""
    loaders = webui_module("loaders")
    if not hasattr(ui, "list_model_elements") and not hasattr(loaders, "list_model_elements"):
        raise HookError("neither modules.ui nor modules.loaders has list_model_elements")
    extend_elements(ui)


HOOKS = (
    Hook("the list of loaders", "modules.loaders", ("loaders_and_params", "loaders_samplers"), add_loader),
    Hook("the list of model settings", "modules.loaders", (), extend_elements),
    Hook("the list of model settings", "modules.ui", (), check_elements),
)
