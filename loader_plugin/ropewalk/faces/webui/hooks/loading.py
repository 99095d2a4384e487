"""Loading and unloading our model.

In every version, the web UI's `load_model` keeps its table of loaders in a local variable. For our loader, that
function therefore runs as if for "Transformers" but under our name, and the helper that would load the model is
replaced during the call. Tokenizer, samplers, settings and messages stay the web UI's own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ropewalk.adapters.request import AdapterUse
from ropewalk.base.errors import RopewalkError
from ropewalk.faces.webui.embedded_model import default_adapters
from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.hooks.arguments import is_our_name, loader_flag
from ropewalk.faces.webui.hooks.loader_table import settings_of_others
from ropewalk.faces.webui.hooks.lora import apply
from ropewalk.faces.webui.model_settings import context_shift, describe, load_options, multiplied_scalings, speculation
from ropewalk.faces.webui.parameters import LOADER, PARAMETERS, name_here
from ropewalk.faces.webui.patching import HookError, swap
from ropewalk.faces.webui.running import is_ours, model_folder, webui_module
from ropewalk.faces.webui.tokenizer_check import check_tokenizer

logger = logging.getLogger(__name__)

# The function with which the web UI loads a Transformers model: since v3.0, and before.
HELPERS = ("transformers_loader", "huggingface_loader")

TOO_LATE = (
    "an extension comes too late for --model with --loader ropewalk, and another loader took the model: use "
    "`ropewalk webui enable` once, or start with `ropewalk webui run`"
)
# Set in modules.models when an idle model is unloaded, to be loaded again when it is needed.
RESTING = "ropewalk_resting"


class StandIn(str):
    """The name of our loader, which finds what is stored under "Transformers" in the web UI's table of loaders."""

    def __eq__(self, other: object) -> bool:
        return other == HOST

    def __ne__(self, other: object) -> bool:
        return other != HOST

    def __hash__(self) -> int:
        return hash(HOST)


HOST = "Transformers"


def context_name() -> str:
    """What this version calls the context length."""
    return name_here(PARAMETERS[0], settings_of_others(webui_module("loaders")))


def check_loadable(model_name: str, values: Mapping[str, Any]) -> None:
    """Raises RopewalkError if loading with these settings would fail, as far as that shows without reading weights."""
    describe(model_folder(model_name), values)
    check_tokenizer(model_name)
    _, draft = speculation(values)
    if draft is not None:
        check_draft(draft)


def check_draft(model_name: str) -> None:
    """Raises RopewalkError if this model cannot guess for another, as far as that shows without reading weights."""
    try:
        describe(model_folder(model_name), {})
    except RopewalkError as error:
        raise type(error)(f"model_draft={model_name}: {error}") from error


def hook_loading(models: ModuleType) -> None:
    shared = webui_module("shared")
    if shared.model is not None and is_our_name(loader_flag(shared)) and not is_ours(shared.model):
        logger.warning("ropewalk: %s", TOO_LATE)
    lock = threading.Lock()  # two loads at once would take each other's helper
    helper = next((name for name in HELPERS if hasattr(models, name)), None)
    if helper is None:
        raise HookError(f"{models.__name__} has none of {', '.join(HELPERS)}")

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(model_name: str, loader: str | None = None, *args: Any, **options: Any) -> Any:
            if wanted_loader(model_name, loader) != LOADER:
                return original(model_name, loader, *args, **options)
            with lock:
                return load_ours(models, helper, original, model_name, *args, **options)

        return load_model

    swap(models, "load_model", make)


def wanted_loader(model_name: str, loader: str | None) -> str | None:
    """The loader that the web UI would use."""
    chosen = loader or webui_module("shared").args.loader
    return chosen or webui_module("models_settings").get_model_metadata(model_name).get("loader")


def load_ours(
    models: ModuleType, helper: str, original: Callable[..., Any], model_name: str, *args: Any, **options: Any
) -> Any:
    """(model, tokenizer). A failure leaves the settings as they were, and is raised for the page and the API to show.
    At the start of the server, which an error would end, it is logged and (None, None) is returned."""
    shared = webui_module("shared")
    starting = shared.generation_lock is None
    try:
        with _settings_kept(shared):
            if starting:
                check_tokenizer(model_name)  # in later loads it was checked before the model in use was unloaded
            load = _prepare(model_name)
            with _replaced(models, helper, load):
                model, tokenizer = original(model_name, StandIn(LOADER), *args, **options)
            shared.args.loader = LOADER
    except Exception as error:
        if not starting:
            raise
        log_failure(model_name, error)
        return None, None
    context = model.ropewalk_model.max_seq_len
    shared.settings["truncation_length"] = context
    logger.info('ropewalk: "%s" is loaded by %s, context length %d', model_name, LOADER, context)
    _wake_loras(models, model_name, model)
    return model, tokenizer


def log_failure(model_name: str, error: Exception) -> None:
    """Log the reason; for an unexpected error, with its traceback."""
    unexpected = not isinstance(error, RopewalkError)
    logger.error('ropewalk: "%s" was not loaded: %s', model_name, error, exc_info=unexpected)


def _prepare(model_name: str) -> Callable[..., Any]:
    """The function that loads the model. Options are decided here; a context of 0 becomes the one that is used (v4.7
    would take 8192)."""
    from ropewalk.faces.hf import from_pretrained

    folder, args = model_folder(model_name), webui_module("shared").args
    options = load_options(folder, vars(args))
    kind, draft = speculation(vars(args))
    shifts = context_shift(vars(args))
    setattr(args, context_name(), options.max_seq_len)
    if multiply := multiplied_scalings(options):
        logger.warning("ropewalk: %s", multiply)

    def load(_: str) -> Any:
        draft_folder = None if draft is None else model_folder(draft)
        model = from_pretrained(folder, kind, draft_folder, shifts, options=options)
        model.logits_by_default = 1  # the web UI reads the last row only, here and in the token tabs
        if not options.has_rope:  # they were trained for the scaling that the folder declares
            _use_adapters(model, default_adapters(folder))
        return model

    return load


def _use_adapters(model: Any, folders: Sequence[Path]) -> None:
    """Have these LoRAs in every reply, until others are chosen."""
    for folder in folders:
        model.load_adapter_folder(folder, folder.name)
        logger.info("ropewalk: the LoRA %s is used, as the model's config.json asks", folder.name)
    model.set_adapters([AdapterUse(folder.name) for folder in folders])


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    saved = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, saved)


@contextmanager
def _settings_kept(shared: Any) -> Iterator[None]:
    """Restore arguments and settings if the block fails; no model is loaded then."""
    args, settings = dict(vars(shared.args)), dict(shared.settings)
    try:
        yield
    except BaseException:
        vars(shared.args).update(args)
        shared.settings.update(settings)
        shared.model_name = "None"
        raise


def hook_unloading(models: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def unload_model(keep_model_name: bool = False) -> Any:
            shared = webui_module("shared")
            if is_ours(shared.model):
                setattr(models, RESTING, (shared.model_name, list(shared.lora_names)) if keep_model_name else None)
                shared.model.unload()
            return original(keep_model_name)

        return unload_model

    swap(models, "unload_model", make)


def _wake_loras(models: ModuleType, model_name: str, model: Any) -> None:
    """Apply the LoRAs again that were in use when this model was unloaded for being idle."""
    resting, names = getattr(models, RESTING, None) or (None, [])
    if resting != model_name or not names:
        return
    try:
        apply(webui_module("LoRA"), model, names)
    except RopewalkError as error:
        logger.error("ropewalk: the LoRAs were not applied again: %s", error)


HOOKS = (
    Hook("loading", "modules.models", ("load_model",), hook_loading),
    Hook("unloading", "modules.models", ("unload_model",), hook_unloading),
)
