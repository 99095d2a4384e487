"""The LoRA menu, `--lora` and the API's LoRA endpoints: adapters of our own, several at once, without a reload."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ropewalk.webui.hook import Hook
from ropewalk.webui.parameters import LOADER
from ropewalk.webui.patching import wrap
from ropewalk.webui.running import is_ours, webui_module

logger = logging.getLogger(__name__)


def hook_lora(lora: ModuleType) -> None:
    """Take over what `add_lora_to_model` calls for models that it does not know."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_lora_transformers(lora_names: list[str]) -> Any:
            shared = webui_module("shared")
            if is_ours(shared.model):
                apply(lora, shared.model, list(lora_names))
                return None
            if shared.model is None and shared.args.loader == LOADER:
                logger.error("ropewalk: no LoRA was applied, as no model is loaded")
                return None
            return original(lora_names)

        return add_lora_transformers

    wrap(lora, "add_lora_transformers", make)


def apply(lora: ModuleType, model: Any, names: list[str]) -> None:
    """Make these the adapters of every reply. If one cannot be loaded, those in use stay.

    Raises:
        RopewalkError: an adapter that cannot be loaded; the message names its file.
    """
    chosen = [name for name in names if name not in ("None", "")]
    for name in chosen:
        if name not in model.adapters:
            model.load_adapter_folder(lora.get_lora_path(name), name)
    model.set_adapters([(name, 1.0) for name in chosen])
    for name in set(model.adapters) - set(chosen):
        model.unload_adapter(name)
    webui_module("shared").lora_names = chosen
    logger.info("ropewalk: LoRAs in use: %s", ", ".join(chosen) or "none")


HOOKS = (Hook("LoRAs", "modules.LoRA", ("add_lora_transformers", "get_lora_path"), hook_lora),)
