"""From messages to a prompt: the model's own chat template, or a named format for models without one.

A message is {"role": "system" | "user" | "assistant", "content": text}; a template may accept more. Templates come
with the model and are untrusted: they run in a process of their own (`template_process.py`), and see plain data only.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from ropewalk.base.errors import ConfigError, RequestError, UnsupportedError, brief
from ropewalk.base.json import read_json_object, read_small_file, shown
from ropewalk.text.chat_formats import FALLBACK, NAMED_FORMATS, ChatFormat, FormatTokens
from ropewalk.text.template_process import TemplateFailure, TemplateLimits, TemplateProcess, TemplateRefusal
from ropewalk.text.template_worker import template_environment
from ropewalk.text.turns import Message, plain_turns, stricter_messages

logger = logging.getLogger(__name__)

MAX_TEMPLATE = 256 * 1024  # characters; the longest known templates have 30,000
# Templates word their refusals freely: one with any of these words may be about the order or the kinds of roles.
ROLE_WORDS = re.compile(r"\b(roles?|alternat\w*|turns?|system|user|assistant|first)\b", re.IGNORECASE)


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja2 template and where it came from. It runs in a process of its own, which starts with the first prompt.

    stop: texts that end a reply, like the model's end tokens, for formats that mark turns with plain words.
    writes_bos: the template writes the bos token if the model wants one, so encoding must not add it.

    Raises:
        ConfigError: the template is not valid jinja2, or longer than `MAX_TEMPLATE`.
    """

    text: str
    source: str
    stop: tuple[str, ...] = ()
    writes_bos: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    limits: TemplateLimits = TemplateLimits()
    _adapted: threading.Event = field(default_factory=threading.Event, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.text) > MAX_TEMPLATE:
            raise ConfigError(
                f"the chat template of {self.source} has {len(self.text):,} characters, at most {MAX_TEMPLATE:,} are "
                f"accepted; choose a named one ({', '.join(NAMED_FORMATS)})"
            )
        try:
            template_environment().parse(self.text)
        except Exception as error:  # not only jinja2's own: nesting too deep, a number with too many digits
            line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ConfigError(
                f"the chat template of {self.source} is not valid jinja2{line}: {brief(error)}; repair it, or "
                f"choose a named one ({', '.join(NAMED_FORMATS)})"
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt for a conversation.

        If the template refuses the order of the roles, the stricter forms of `turns.stricter_messages` are tried, and
        the log says so once.

        add_generation_prompt: end with the beginning of the assistant's turn. variables: other values that the
        template reads, such as `tools` or `enable_thinking`; plain data.

        Raises:
            RequestError: messages have the wrong form; the template refuses them, fails, or exceeds a limit.
        """
        messages = checked_messages(messages)
        values = {"tools": None, "documents": None, **self.special_tokens, **variables}
        values["add_generation_prompt"] = add_generation_prompt
        try:
            return self._run({**values, "messages": messages})
        except TemplateRefusal as refusal:
            if ROLE_WORDS.search(str(refusal)):
                for stricter in stricter_messages(messages):
                    try:
                        prompt = self._run({**values, "messages": stricter})
                    except TemplateRefusal:
                        continue
                    self._note_adapted(refusal)
                    return prompt
            raise RequestError(
                f"the chat template of {self.source} refuses these messages: {brief(refusal)}"
            ) from refusal

    def _run(self, values: Mapping[str, Any]) -> str:
        try:
            return self._process.render(values)
        except TemplateFailure as error:
            raise RequestError(
                f"the chat template of {self.source} failed ({brief(error)}); choose a named one "
                f"({', '.join(NAMED_FORMATS)}) instead"
            ) from error
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the variables of a chat template must be plain data: {brief(error)}") from error

    def _note_adapted(self, refusal: TemplateRefusal) -> None:
        if not self._adapted.is_set():
            self._adapted.set()
            logger.warning(
                "the chat template of %s refuses some conversations (%s): for those, consecutive messages of the same "
                "role are joined and system texts are moved into the user's turns (said once)",
                self.source,
                brief(refusal),
            )

    @cached_property
    def _process(self) -> TemplateProcess:
        return TemplateProcess(self.text, self.limits)


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """One of the formats in `chat_formats`, used like a `ChatTemplate`."""

    source: str
    format: ChatFormat
    tokens: FormatTokens

    @property
    def stop(self) -> tuple[str, ...]:
        """As in `ChatTemplate`."""
        return self.format.stop

    @property
    def writes_bos(self) -> bool:
        """As in `ChatTemplate`."""
        return self.format.writes_bos

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt for a conversation in any order of roles; `variables` have no effect.

        Raises:
            RequestError: messages have the wrong form, an unknown role, or content other than text.
        """
        turns = plain_turns(checked_messages(messages))
        return self.format.write(turns, self.tokens, add_generation_prompt)


Template = ChatTemplate | NamedTemplate


def named_template(name: str, special_tokens: Mapping[str, str] | None = None) -> NamedTemplate:
    """One of the formats in `chat_formats`, for models that bring no template.

    Raises:
        UnsupportedError: no such name; the message lists them all.
    """
    if name not in NAMED_FORMATS:
        raise UnsupportedError(f"chat template {name!r} is not known; accepted are {', '.join(NAMED_FORMATS)}")
    texts = special_tokens or {}
    tokens = FormatTokens(texts.get("bos_token", ""), texts.get("eos_token", ""))
    return NamedTemplate(f"the named format {name!r}", NAMED_FORMATS[name], tokens)


def model_template(folder: Path, special_tokens: Mapping[str, str]) -> Template:
    """The template that a model folder brings, or the fallback, with a warning in the log.

    Raises:
        ConfigError: as `load_chat_template`.
    """
    brought = load_chat_template(folder, special_tokens)
    if brought is not None:
        return brought
    logger.warning(
        "%s brings no chat template: conversations are written in the format %r, which the model may not know; "
        "choose the one that it was trained with: --chat-template NAME (%s)",
        folder.name,
        FALLBACK,
        ", ".join(NAMED_FORMATS),
    )
    return named_template(FALLBACK, special_tokens)


def load_chat_template(folder: Path, special_tokens: Mapping[str, str], name: str | None = None) -> ChatTemplate | None:
    """The template that a model folder brings, or None.

    chat_template.jinja comes first, then chat_template.json, then `chat_template` of tokenizer_config.json, as in
    transformers. name: which of several (default: "default").

    Raises:
        ConfigError: a damaged file, an invalid template, or several templates, none of which has that name.
    """
    found = _find_templates(folder)
    if found is None:
        return None
    source, templates = found
    wanted = name or ("default" if "default" in templates or len(templates) > 1 else next(iter(templates)))
    if wanted not in templates:
        raise ConfigError(f"{source} has no chat template named {wanted!r}; it has {', '.join(map(repr, templates))}")
    # Clients of a server see the source in errors: they must not learn where on this machine the folder is.
    return ChatTemplate(templates[wanted], f"{folder.name}/{source.name}", special_tokens=special_tokens)


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain data, which is all that a template gets to see.

    Raises:
        RequestError: not a list of mappings with a role, or values that are not plain data.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of {{role, content}} mappings, got {type(messages).__name__}")
    if not messages:
        raise RequestError("there are no messages; at least one is needed")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {number} must be a mapping with role and content, got {shown(message)}")
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f"message {number} (role {message['role']!r}) has no content")
    try:
        return json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"messages must hold plain data only (text, numbers, lists, mappings): {brief(error)}"
        ) from error


def _find_templates(folder: Path) -> tuple[Path, dict[str, str]] | None:
    """(file, name -> template) of the first file that has any."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path, {"default": read_small_file(path).decode("utf-8")}
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} cannot be read as UTF-8 text: {brief(error)}") from error
    for file_name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / file_name
        value = read_json_object(path).get("chat_template") if path.exists() else None
        if value is not None:
            return path, _named_texts(value, path)
    return None


def _named_texts(value: Any, path: Path) -> dict[str, str]:
    """A template, or a list of {"name": ..., "template": ...}."""
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else [None]
    texts = {}
    for entry in entries:
        named = entry if isinstance(entry, Mapping) else {}
        if not isinstance(named.get("name"), str) or not isinstance(named.get("template"), str):
            raise ConfigError(
                f"{path}: chat_template must be a string or a list of objects with name and template, "
                f"found {shown(value)}"
            )
        texts[named["name"]] = named["template"]
    if not texts:
        raise ConfigError(f"{path}: chat_template is an empty list")
    return texts
