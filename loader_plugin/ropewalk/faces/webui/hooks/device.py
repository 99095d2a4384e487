"""On the CPU, our model takes and returns tensors in main memory. Older web UIs (v3.0, not v3.23) move them to a GPU if
there is one, whatever the model. With --cpu they never do, so we make that flag true while such a model is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.patching import swap
from ropewalk.faces.webui.running import is_ours, webui_module


@contextmanager
def tensors_stay() -> Iterator[None]:
    """As if the server had been started with --cpu."""
    args = webui_module("shared").args
    saved, args.cpu = args.cpu, True
    try:
        yield
    finally:
        args.cpu = saved


def hook_encode(text_generation: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def encode(*args: Any, **options: Any) -> Any:
            model = webui_module("shared").model
            if not is_ours(model) or model.device.type != "cpu":
                return original(*args, **options)
            with tensors_stay():
                return original(*args, **options)

        return encode

    swap(text_generation, "encode", make)


HOOKS = (Hook("keeping tokens in main memory", "modules.text_generation", ("encode",), hook_encode),)
