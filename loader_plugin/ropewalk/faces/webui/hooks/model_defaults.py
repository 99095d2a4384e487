"""What selecting a model sets: our loader for GPTQ folders, and the fields as config.json declares them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ropewalk.base.errors import RopewalkError, UnsupportedError
from ropewalk.faces.webui.gptq_folders import is_gptq_like, reads_gptq
from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.hooks.arguments import is_our_name, loader_flag
from ropewalk.faces.webui.hooks.loader_table import settings_of_others
from ropewalk.faces.webui.model_settings import Settings, declared_settings, refusal
from ropewalk.faces.webui.parameters import LOADER, PARAMETERS, name_here
from ropewalk.faces.webui.patching import swap, wrap
from ropewalk.faces.webui.running import model_folder, webui_module

logger = logging.getLogger(__name__)


def choose_for_gptq(models_settings: ModuleType) -> None:
    """Let `infer_loader` choose our loader for GPTQ-like folders (never for GGUF). Those that we do not read are
    refused with a reason, unless another loader reads them.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def infer_loader(model_name: str, *args: Any, **options: Any) -> Any:
            loader = original(model_name, *args, **options)
            if loader in (None, "llama.cpp"):
                return loader
            folder = model_folder(model_name)
            if not is_gptq_like(folder) or (reads_gptq(loader) and isinstance(refusal(folder), UnsupportedError)):
                return loader
            return LOADER

        return infer_loader

    wrap(models_settings, "infer_loader", make)


def fill_settings(models_settings: ModuleType) -> None:
    """Add our settings to what `get_model_metadata` returns; every way of selecting a model calls it."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_model_metadata(model: str, *args: Any, **options: Any) -> Any:
            settings = original(model, *args, **options)
            folder = model_folder(model)
            if model not in (None, "", "None") and folder.is_dir():
                fill(settings, folder)
            return settings

        return get_model_metadata

    swap(models_settings, "get_model_metadata", make)


def fill(settings: dict[str, Any], folder: Path) -> None:
    """Set what nobody has saved for this model. Settings that other loaders have too are left to them, unless the model
    is for our loader."""
    shared = webui_module("shared")
    ours = settings.get("loader") == LOADER or is_our_name(loader_flag(shared))
    of_others = settings_of_others(webui_module("loaders"))
    saved = saved_settings(folder.name)
    try:
        declared = declared_settings(folder)
    except RopewalkError as error:
        if ours:
            logger.warning("ropewalk: %s", error)
        declared = {item.name: item.default for item in PARAMETERS}
        ours = False
    for name, value in by_names_here(declared, of_others).items():
        if name not in saved and (ours or name not in of_others):
            settings[name] = value
    if ours:
        context = settings[name_here(PARAMETERS[0], of_others)]
        settings["truncation_length"] = saved.get("truncation_length", context)
        settings["truncation_length_info"] = context


def by_names_here(values: Settings, known: set[str]) -> Settings:
    """The values under the names that this version uses, which has the settings `known`."""
    return {name_here(item, known): values[item.name] for item in PARAMETERS}


def saved_settings(model_name: str) -> dict[str, Any]:
    """What config-user.yaml has for a model: its keys are regular expressions."""
    found: dict[str, Any] = {}
    for pattern, settings in getattr(webui_module("shared"), "user_config", {}).items():
        if re.match(pattern.lower(), model_name.lower()):
            found |= settings or {}
    return found


HOOKS = (
    Hook("choosing ropewalk for GPTQ folders", "modules.models_settings", ("infer_loader",), choose_for_gptq),
    Hook("filling the settings of a model", "modules.models_settings", ("get_model_metadata",), fill_settings),
)
