"""Training a LoRA needs gradients, which kernels for inference do not give: refused with what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.patching import wrap
from ropewalk.faces.webui.running import is_ours, webui_module

REFUSAL = (
    "Error: a model loaded with ropewalk cannot be trained, as it has no gradients. Load the unquantised model with "
    "the Transformers loader, train the LoRA there, and apply it here: ropewalk runs LoRAs of PEFT."
)


def hook_training(training: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def do_train(*args: Any, **options: Any) -> Iterator[Any]:
            if is_ours(webui_module("shared").model):
                yield REFUSAL
                return
            yield from original(*args, **options)

        return do_train

    wrap(training, "do_train", make)


HOOKS = (Hook("refusing to train", "modules.training", ("do_train",), hook_training),)
