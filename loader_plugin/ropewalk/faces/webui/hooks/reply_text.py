"""The text of a reply with all its spaces.

The web UI decodes each piece of a reply alone. A sentencepiece tokenizer drops one space at the start of what it
decodes, and the web UI puts one back only where none is left: a token of eight spaces came out as seven.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.patching import swap
from ropewalk.faces.webui.running import is_ours, webui_module

WORD = "a"  # decoded in front of the tokens, so that a space dropped at the start is not theirs


def hook_reply_text(text_generation: ModuleType) -> None:
    """Swapped, not wrapped: the module that streams replies has imported the function by name."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_reply_from_output_ids(output_ids: Any, state: Any = None, starting_from: int = 0) -> Any:
            shared = webui_module("shared")
            if not is_ours(shared.model) or shared.tokenizer is None:
                return original(output_ids, state, starting_from)
            skip_special = state["skip_special_tokens"] if state else True
            text = text_of(shared.tokenizer, [int(token) for token in output_ids[starting_from:]], skip_special)
            return original(output_ids, state, starting_from) if text is None else text

        return get_reply_from_output_ids

    swap(text_generation, "get_reply_from_output_ids", make)


def text_of(tokenizer: Any, token_ids: list[int], skip_special_tokens: bool) -> str | None:
    """What the tokens say after a word; None for a tokenizer that does not decode them one after another."""
    word = tokenizer.encode(WORD, add_special_tokens=False)[-1:]
    before = tokenizer.decode(word, skip_special_tokens=skip_special_tokens)
    text = tokenizer.decode([*word, *token_ids], skip_special_tokens=skip_special_tokens)
    return text.removeprefix(before) if before and text.startswith(before) else None


HOOKS = (Hook("the spaces of a reply", "modules.text_generation", ("get_reply_from_output_ids",), hook_reply_text),)
