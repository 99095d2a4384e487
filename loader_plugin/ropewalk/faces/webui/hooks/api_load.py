"""Loading through the API: what must fail is refused while the previous model still runs, and the answer says why."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from ropewalk.base.errors import ConfigError, RopewalkError, UnsupportedError
from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.hooks.arguments import is_our_name
from ropewalk.faces.webui.hooks.loader_table import settings_of_others
from ropewalk.faces.webui.hooks.loading import check_loadable, log_failure
from ropewalk.faces.webui.hooks.messages import hopeless
from ropewalk.faces.webui.hooks.model_defaults import by_names_here
from ropewalk.faces.webui.model_settings import declared_settings
from ropewalk.faces.webui.parameters import BORROWED, LOADER, PARAMETERS, name_here
from ropewalk.faces.webui.patching import swap, wrap
from ropewalk.faces.webui.running import model_folder, webui_module

logger = logging.getLogger(__name__)

# Why the current request failed. The web UI answers "Failed to load the model." whatever the reason.
FAILURE: ContextVar[str | None] = ContextVar("FAILURE", default=None)


def hook_api_load(api_models: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _load_model(data: dict[str, Any]) -> Any:
            with noting_failures():
                return original(completed(data))

        return _load_model

    wrap(api_models, "_load_model", make)


def hook_api_loras(api_models: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_loras(lora_names: list[str]) -> Any:
            with noting_failures():
                return original(lora_names)

        return load_loras

    wrap(api_models, "load_loras", make)


@contextmanager
def noting_failures() -> Iterator[None]:
    """Keep the message of an error of ours for the answer."""
    try:
        yield
    except RopewalkError as error:
        FAILURE.set(str(error))
        raise


def completed(data: dict[str, Any]) -> dict[str, Any]:
    """The request, unchanged for other loaders; for ours, with the settings that it leaves out filled in as they were
    saved, or as config.json declares them.

    Raises:
        RopewalkError: loading would fail.
    """
    name = data["model_name"]
    of_others = settings_of_others(webui_module("loaders"))
    names = {spelled: name_here(item, of_others) for item in PARAMETERS for spelled in (item.name, *item.former_names)}
    given = {names.get(key, key): value for key, value in (data.get("args") or {}).items()}
    metadata = webui_module("models_settings").get_model_metadata(name)
    loader = given.get("loader") or metadata.get("loader")
    try:
        if not is_our_name(loader):
            if reason := hopeless(name, loader):
                raise UnsupportedError(reason)
            return data
        check_names(given)
        folder = model_folder(name)
        declared = by_names_here(declared_settings(folder), of_others)
        saved = {key: metadata[key] for key in declared if key in metadata and metadata.get("loader") == LOADER}
        arguments = {**declared, **saved, **given, "loader": LOADER}
        check_loadable(name, arguments)
    except RopewalkError as error:
        log_failure(name, error)
        raise
    return {**data, "args": arguments}


def check_names(given: Mapping[str, Any]) -> None:
    """Refuse unknown arguments. Those of other loaders are ignored, as by the web UI, with a warning that names them.

    Raises:
        ConfigError: an argument is unknown; the message suggests the closest name.
    """
    of_others = settings_of_others(webui_module("loaders"))
    own = {"loader", *BORROWED, *(name_here(item, of_others) for item in PARAMETERS)}
    known = own | of_others | set(vars(webui_module("shared").args))
    unknown = [name for name in given if name not in known]
    if unknown:
        likely = difflib.get_close_matches(unknown[0], own, n=1)
        hint = f"did you mean {likely[0]}? " if likely else ""
        raise ConfigError(f"args: there is no {unknown[0]}: {hint}{LOADER} takes {', '.join(sorted(own))}")
    if ignored := [name for name in given if name not in own]:
        logger.warning("ropewalk: args: %s: not a setting of this loader, ignored", ", ".join(ignored))


def hook_answers(api_script: ModuleType) -> None:
    """Swapped, not wrapped: FastAPI's routes hold the functions themselves."""
    for name in ("handle_load_model", "handle_load_loras"):
        swap(api_script, name, with_reason)


def with_reason(original: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, with our reason in its answer: before v4 it returns the exception, since then it raises it."""

    async def handle(*args: Any, **options: Any) -> Any:
        FAILURE.set(None)
        try:
            answer = await original(*args, **options)
        except Exception as error:
            _say_why(error)
            raise
        _say_why(answer)
        return answer

    return handle


def _say_why(answer: Any) -> None:
    reason = FAILURE.get()
    if reason is not None and hasattr(answer, "detail"):
        answer.detail = f"{answer.detail} {reason}"


HOOKS = (
    Hook("loading through the API", "modules.api.models", ("_load_model",), hook_api_load),
    Hook("loading through the API", "extensions.openai.models", ("_load_model",), hook_api_load),
    Hook("LoRAs through the API", "modules.api.models", ("load_loras",), hook_api_loras),
    Hook("LoRAs through the API", "extensions.openai.models", ("load_loras",), hook_api_loras),
    Hook("reasons in the API", "modules.api.script", ("handle_load_model", "handle_load_loras"), hook_answers),
    Hook("reasons in the API", "extensions.openai.script", ("handle_load_model", "handle_load_loras"), hook_answers),
)
