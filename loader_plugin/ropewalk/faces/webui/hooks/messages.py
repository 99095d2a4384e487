"""What the Model tab says about our loader, and the truncation length that follows the context."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ropewalk.base.errors import RopewalkError
from ropewalk.base.memory import format_bytes
from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.hooks.loading import check_loadable, context_name, log_failure
from ropewalk.faces.webui.model_settings import describe
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
            ours = not autoload and chooses_ours(selected_model)  # the loader given may be that of the model before
            for text in original(selected_model, loader, autoload):
                yield append(text, decision(selected_model)) if ours else text

        return load_model_wrapper

    wrap(menu, "load_model_wrapper", make)


def append(text: str, more: str) -> str:
    """Markdown after markdown; a list goes on where both have one."""
    in_list = text.rstrip().rpartition("\n")[2].startswith("- ") and more.startswith("- ")
    return f"{text.rstrip()}{NEXT_ITEM if in_list else NEW_PARAGRAPH}{more}"


def chooses_ours(model_name: str) -> bool:
    """True if selecting the model chooses our loader."""
    if model_name in NO_MODEL or not model_folder(model_name).is_dir():
        return False
    return webui_module("models_settings").get_model_metadata(model_name).get("loader") == LOADER


def load_with_reason(model_name: str) -> Iterator[str]:
    """Load for the page. What can be refused without reading weights is refused while the model before still runs."""
    shared, models = webui_module("shared"), webui_module("models")
    yield f"Loading `{model_name}` with {LOADER}..."
    try:
        check_loadable(model_name)
        models.unload_model()
        shared.model, shared.tokenizer = models.load_model(model_name, LOADER)
    except Exception as error:  # whatever it is, the page shows it
        log_failure(model_name, error)
        reason = str(error) if isinstance(error, RopewalkError) else f"{type(error).__name__}: {error}"
        yield f"Failed to load `{model_name}`.\n\n{as_markdown(reason)}{_still_loaded()}"
        return
    yield f"Successfully loaded `{model_name}`.\n\n{decision(model_name)}"


def _still_loaded() -> str:
    shared = webui_module("shared")
    return f"\n\n`{shared.model_name}` is still loaded." if shared.model is not None else ""


def decision(model_name: str) -> str:
    """What loading with the settings as they are means, for the page; or why it cannot be done."""
    folder, args = model_folder(model_name), vars(webui_module("shared").args)
    try:
        info = describe(folder, args)
    except RopewalkError as error:
        return f"This model cannot be loaded with these settings:\n\n{as_markdown(str(error))}"
    cache = format_bytes(info.cache_bytes[info.max_seq_len])
    weights = format_bytes(info.weight_bytes)
    lines = [
        f"{info.family}, {info.num_instances} layers, {' and '.join(info.linears)}",
        info.rope.replace(f"{folder}/", ""),  # the name of a file there says enough
        f"Context {info.max_seq_len}; memory: weights {weights}, {info.cache_type} cache {cache}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def as_markdown(message: str) -> str:
    """A message to be shown as it is; what follows its first line (where in a text a mistake is) in columns."""
    first, _, rest = message.partition("\n")
    escaped = re.sub(r"([\\`*_{}\[\]<>#@|~])", r"\\\1", first)
    return f"{escaped}\n\n```\n{rest}\n```" if rest else escaped


def hook_lora_messages(menu: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_lora_wrapper(selected_loras: list[str]) -> Iterator[str]:
            try:
                yield from original(selected_loras)
            except RopewalkError as error:
                logger.error("ropewalk: %s", error)
                in_use = ", ".join(webui_module("shared").lora_names) or "none"
                yield f"The LoRAs were not applied.\n\n{as_markdown(str(error))}\n\nIn use: {in_use}."

        return load_lora_wrapper

    wrap(menu, "load_lora_wrapper", make)


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
