"""The LoRA menu, `--lora` and the API's LoRA endpoints: adapters of our own, several at once, without a reload."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ropewalk.adapters.request import AdapterUse, parse_request
from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.parameters import LOADER
from ropewalk.faces.webui.patching import wrap
from ropewalk.faces.webui.running import is_ours, webui_module

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

    names: folders of LoRAs, as the menu has them; flags and the API may say more, such as "storm:0.5@10-11".

    Raises:
        RopewalkError: an adapter cannot be loaded, and the message names its file; or a text does not name adapters.
    """
    chosen = [name for name in names if name not in ("None", "")]
    uses = [use for name in chosen for use in uses_of(lora, name)]
    try:
        for name in {use.name for use in uses} - set(model.adapters):
            model.load_adapter_folder(lora.get_lora_path(name), name)
        model.set_adapters(uses)
    finally:
        for name in set(model.adapters) - {use[0] for use in model.used_adapters}:
            model.unload_adapter(name)
    webui_module("shared").lora_names = chosen
    logger.info("ropewalk: LoRAs in use: %s", ", ".join(chosen) or "none")


def uses_of(lora: ModuleType, name: str) -> tuple[AdapterUse, ...]:
    """The LoRA in the folder of that name; if there is no such folder, the LoRAs that the text names."""
    return (AdapterUse(name),) if lora.get_lora_path(name).is_dir() else parse_request(name, "LoRAs")


HOOKS = (Hook("LoRAs", "modules.LoRA", ("add_lora_transformers", "get_lora_path"), hook_lora),)
