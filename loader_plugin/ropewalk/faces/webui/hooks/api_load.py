"""Loading through the API: a folder that cannot be loaded is refused while the model before still runs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ropewalk.base.errors import RopewalkError
from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.hooks.arguments import is_our_name
from ropewalk.faces.webui.hooks.loader_table import settings_of_others
from ropewalk.faces.webui.hooks.loading import log_failure
from ropewalk.faces.webui.hooks.model_defaults import by_names_here
from ropewalk.faces.webui.model_settings import declared_settings, describe
from ropewalk.faces.webui.parameters import LOADER, PARAMETERS, name_here
from ropewalk.faces.webui.patching import wrap
from ropewalk.faces.webui.running import model_folder, webui_module


def hook_api_load(api_models: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _load_model(data: dict[str, Any]) -> Any:
            return original(completed(data))

        return _load_model

    wrap(api_models, "_load_model", make)


def completed(data: dict[str, Any]) -> dict[str, Any]:
    """A request as it came, or for our loader with every setting that it leaves out as config.json declares it.

    Raises:
        RopewalkError: loading would fail.
    """
    name = data["model_name"]
    of_others = settings_of_others(webui_module("loaders"))
    names = {item.name: name_here(item, of_others) for item in PARAMETERS}
    given = {names.get(key, key): value for key, value in (data.get("args") or {}).items()}
    metadata = webui_module("models_settings").get_model_metadata(name)
    loader = given.get("loader") or metadata.get("loader")
    if not is_our_name(loader):
        return data
    folder = model_folder(name)
    try:
        declared = by_names_here(declared_settings(folder), of_others)
        saved = {key: metadata[key] for key in declared if key in metadata and metadata.get("loader") == LOADER}
        arguments = {**declared, **saved, **given, "loader": LOADER}
        describe(folder, arguments)
    except RopewalkError as error:
        log_failure(name, error)
        raise
    return {**data, "args": arguments}


HOOKS = (
    Hook("loading through the API", "modules.api.models", ("_load_model",), hook_api_load),
    Hook("loading through the API", "extensions.openai.models", ("_load_model",), hook_api_load),
)
