"""Fields that this server does not implement and that would change the reply: refused by name instead of ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ropewalk.faces.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Refusal:
    """allowed: values that ask for nothing special. reason: what to do instead."""

    reason: str
    allowed: Callable[[Any], bool] = lambda value: False


_NO_GRAMMAR = Refusal("replies are not constrained to a format here; ask for it in the prompt")
_ANYWHERE: dict[str, Refusal] = {
    name: _NO_GRAMMAR
    for name in ("grammar", "json_schema", "structured_outputs")
    + tuple(f"guided_{kind}" for kind in ("json", "regex", "choice", "grammar"))
}
_COMPLETIONS: dict[str, Refusal] = {
    "suffix": Refusal("text is continued at its end only", lambda value: value == ""),
    "best_of": Refusal("all replies are returned; ask for n of them", lambda value: value == 1),
}
_CHAT: dict[str, Refusal] = {
    "response_format": Refusal(_NO_GRAMMAR.reason, lambda value: value == {"type": "text"}),
    "functions": Refusal("this is the old form; use tools, which are handed to the chat template", lambda v: v == []),
    "function_call": Refusal("calls are not forced; leave it out", lambda value: value in ("auto", "none")),
    "tool_choice": Refusal('calls are not forced; use "auto" or "none"', lambda value: value in ("auto", "none")),
    "modalities": Refusal("replies are text", lambda value: value == ["text"]),
    "audio": Refusal("replies are text"),
    "web_search_options": Refusal("there is no web search here"),
}


def check_completion_fields(extra: Mapping[str, Any]) -> list[str]:
    """The names of the fields that are ignored.

    Raises:
        ApiError: one must not be ignored.
    """
    return _check(extra, _ANYWHERE | _COMPLETIONS)


def check_chat_fields(extra: Mapping[str, Any]) -> list[str]:
    """As `check_completion_fields`, for a conversation."""
    return _check(extra, _ANYWHERE | _CHAT)


def _check(extra: Mapping[str, Any], refusals: Mapping[str, Refusal]) -> list[str]:
    for name, value in extra.items():
        refusal = refusals.get(name)
        if refusal is not None and value is not None and not refusal.allowed(value):
            raise ApiError(400, f"{name} is not supported: {refusal.reason}", name, "unsupported_parameter")
    return sorted(name for name in extra if name not in refusals)
