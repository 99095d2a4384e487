"""The line on the console after each reply, as users of the exllama loaders know it, with what was reused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.hooks.device import tensors_stay
from ropewalk.faces.webui.patching import wrap
from ropewalk.faces.webui.running import is_ours, webui_module

logger = logging.getLogger(__name__)


def hook_reply(text_generation: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_reply_HF(*args: Any, **options: Any) -> Iterator[Any]:
            model = webui_module("shared").model
            if not is_ours(model):
                yield from original(*args, **options)
                return
            try:
                with tensors_stay():
                    yield from original(*args, **options)
            finally:
                if model.last_stats is not None:
                    model.last_prompt_token_count = model.last_stats.prompt_tokens  # v4 puts it into replies of the API
                    logger.info("ropewalk: %s", model.last_stats.describe())

        return generate_reply_HF

    wrap(text_generation, "generate_reply_HF", make)


HOOKS = (Hook("the line after each reply", "modules.text_generation", ("generate_reply_HF",), hook_reply),)
