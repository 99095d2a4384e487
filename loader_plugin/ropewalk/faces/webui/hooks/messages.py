"""What the Model tab says about our loader, and the truncation length that follows the context."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

from ropewalk.base.errors import RopewalkError
from ropewalk.base.memory import format_bytes
from ropewalk.faces.webui.gptq_folders import READERS, is_gptq_like, reads_gptq
from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.hooks.loading import check_loadable, context_name, log_failure
from ropewalk.faces.webui.listening import warnings_heard
from ropewalk.faces.webui.model_settings import describe, load_options, multiplied_scalings, refusal
from ropewalk.faces.webui.parameters import LOADER
from ropewalk.faces.webui.patching import wrap
from ropewalk.faces.webui.running import is_ours, model_folder, webui_module

logger = logging.getLogger(__name__)

NEXT_ITEM, NEW_PARAGRAPH = "\n", "\n\n"
NO_MODEL = (None, "", "None")


def hook_load_messages(menu: ModuleType) -> None:
    """`load_model_wrapper` is a generator of status texts, run when a model is selected and when Load is pressed."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_model_wrapper(selected_model: str, loader: str, autoload: bool = False) -> Iterator[str]:
            if autoload and loader == LOADER and selected_model not in NO_MODEL:
                yield from load_with_reason(selected_model)
                return
            if autoload and (reason := hopeless(selected_model, loader)):
                logger.error("ropewalk: %s", reason)
                yield failure(selected_model, reason)
                return
            more = "" if autoload else remark(selected_model)  # the loader given may be that of the previous model
            for text in original(selected_model, loader, autoload):
                yield append(text, more) if more else text

        return load_model_wrapper

    wrap(menu, "load_model_wrapper", make)


def append(text: str, more: str) -> str:
    """Append markdown to markdown. If both meet in a list, it becomes one list."""
    in_list = text.rstrip().rpartition("\n")[2].startswith("- ") and more.startswith("- ")
    return f"{text.rstrip()}{NEXT_ITEM if in_list else NEW_PARAGRAPH}{more}"


def remark(model_name: str) -> str:
    """What to say about a selected model: how our loader would load it, or why it cannot."""
    if model_name in NO_MODEL or not model_folder(model_name).is_dir():
        return ""
    chosen = webui_module("models_settings").get_model_metadata(model_name).get("loader")
    if chosen == LOADER:
        return decision(model_name)
    folder = model_folder(model_name)
    reason = refusal(folder) if is_gptq_like(folder) else None
    return "" if reason is None else _not_readable(reason)


def hopeless(model_name: str, loader: str) -> str | None:
    """Why another loader cannot load this folder, if we know: it has quantised weights, and the package is missing.

    Asked before the model in use is unloaded; the loader itself would only find out afterwards.
    """
    if loader not in READERS or model_name in NO_MODEL:
        return None
    folder = model_folder(model_name)
    if not is_gptq_like(folder) or reads_gptq(loader):
        return None
    reason = refusal(folder)
    ours = f"choose {LOADER} as Model loader" if reason is None else f"{LOADER} does not read it either: {reason}"
    packages = " or ".join(READERS[loader])
    return f"{loader} needs {packages}, which this Python lacks, for the quantised weights of {model_name}: {ours}"


def load_with_reason(model_name: str) -> Iterator[str]:
    """Load for the page. What can be refused without reading weights is refused while the previous model still runs."""
    shared, models = webui_module("shared"), webui_module("models")
    yield f"Loading `{model_name}` with {LOADER}..."
    try:
        with warnings_heard() as heard:
            check_loadable(model_name, vars(shared.args))
            models.unload_model()
            shared.model, shared.tokenizer = models.load_model(model_name, LOADER)
    except Exception as error:  # the page shows whatever it is
        log_failure(model_name, error)
        reason = str(error) if isinstance(error, RopewalkError) else f"{type(error).__name__}: {error}"
        yield failure(model_name, reason)
        return
    yield f"Successfully loaded `{model_name}`.\n\n{decision(model_name, heard)}"


def failure(model_name: str, reason: str) -> str:
    """What the page shows in place of a model."""
    return f"Failed to load `{model_name}`.\n\n{as_markdown(reason)}{_still_loaded()}"


def _still_loaded() -> str:
    shared = webui_module("shared")
    return f"\n\n`{shared.model_name}` is still loaded." if shared.model is not None else ""


def decision(model_name: str, heard: Sequence[str] = ()) -> str:
    """What loading with the current settings would give, for the page; or why it cannot be done.

    heard: warnings of the loading itself.
    """
    folder, args = model_folder(model_name), vars(webui_module("shared").args)
    try:
        with warnings_heard() as warned:
            info = describe(folder, args)
            multiply = multiplied_scalings(load_options(folder, args))
    except RopewalkError as error:
        reason = refusal(folder)
        if reason is not None:
            return _not_readable(reason)
        return f"This model cannot be loaded with these settings:\n\n{as_markdown(str(error))}"
    cache = format_bytes(info.cache_bytes[info.max_seq_len])
    weights = format_bytes(info.weight_bytes)
    lines = [
        f"{info.family}, {info.num_instances} layers, {' and '.join(info.linears)}",
        info.rope.replace(f"{folder}/", ""),  # the name of a file there says enough
        f"Context {info.max_seq_len}; memory: weights {weights}, {info.cache_type} cache {cache}",
    ]
    facts = "\n".join(f"- {line}" for line in lines)
    said = dict.fromkeys(
        text.removeprefix("ropewalk: ").replace(f"{folder}/", "") for text in (*heard, *warned, multiply) if text
    )
    return append(facts, warning_list(said)) if said else facts


def warning_list(warnings: Iterable[str]) -> str:
    """Warnings as items of a list."""
    return "\n".join(f"- **Warning:** {as_markdown(text)}" for text in warnings)


def _not_readable(reason: RopewalkError) -> str:
    return f"{LOADER} cannot load this model:\n\n{as_markdown(str(reason))}"


def as_markdown(message: str) -> str:
    """A message, escaped to be shown as it is; lines after the first, which point into a text, keep their columns."""
    first, _, rest = message.partition("\n")
    escaped = re.sub(r"([\\`*_{}\[\]<>#@|~])", r"\\\1", first)
    return f"{escaped}\n\n```\n{rest}\n```" if rest else escaped


def hook_lora_messages(menu: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_lora_wrapper(selected_loras: list[str]) -> Iterator[str]:
            try:
                yield from _with_warnings(original(selected_loras))
            except RopewalkError as error:
                logger.error("ropewalk: %s", error)
                in_use = ", ".join(webui_module("shared").lora_names) or "none"
                yield f"The LoRAs were not applied.\n\n{as_markdown(str(error))}\n\nIn use: {in_use}."

        return load_lora_wrapper

    wrap(menu, "load_lora_wrapper", make)


def _with_warnings(texts: Iterator[str]) -> Iterator[str]:
    """The texts, each with the warnings given while it was made."""
    while True:
        with warnings_heard() as heard:
            text = next(texts, None)
        if text is None:
            return
        yield append(text, warning_list(heard)) if heard else text


def hook_truncation(menu: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def update_truncation_length(current_length: Any, state: dict[str, Any]) -> Any:
            shared = webui_module("shared")
            if state.get("loader") != LOADER:
                return original(current_length, state)
            if is_ours(shared.model):
                return shared.settings["truncation_length"]
            return state.get(context_name()) or current_length

        return update_truncation_length

    wrap(menu, "update_truncation_length", make)


HOOKS = (
    Hook("messages about loading", "modules.ui_model_menu", ("load_model_wrapper",), hook_load_messages),
    Hook("messages about LoRAs", "modules.ui_model_menu", ("load_lora_wrapper",), hook_lora_messages),
    Hook("the truncation length", "modules.ui_model_menu", ("update_truncation_length",), hook_truncation),
)
