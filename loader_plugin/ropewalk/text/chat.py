"""From messages to a prompt: the model's own chat template, or one of the named ones for models without.

A message is {"role": "system" | "user" | "assistant", "content": text}; a template may accept more. Templates come
with the model and are untrusted: they run in jinja2's immutable sandbox, and see plain data only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ropewalk.base.errors import ConfigError, RequestError, UnsupportedError
from ropewalk.base.json import read_json_object, read_small_file, shown
from ropewalk.text.chat_formats import NAMED_FORMATS

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja2 template with where it came from.

    stop: text at which a reply ends besides the model's end tokens, for formats that mark turns by plain words.
    writes_bos: the template writes the bos token where the model wants one, so encoding must not add it.

    Raises:
        ConfigError: the template is not valid jinja2.
    """

    text: str
    source: str
    stop: tuple[str, ...] = ()
    writes_bos: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self._compiled

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt for a conversation.

        add_generation_prompt: end with the beginning of the assistant's turn. variables: what else the template
        reads, such as `tools` or `enable_thinking`.

        Raises:
            RequestError: messages of the wrong form, or the template refuses them or fails.
        """
        values = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return self._compiled.render(
                messages=checked_messages(messages), add_generation_prompt=add_generation_prompt, **values
            )
        except _TemplateRefusal as error:
            raise RequestError(f"the chat template of {self.source} refuses these messages: {error}") from error
        except RequestError:
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            raise RequestError(
                f"the chat template of {self.source} failed ({type(error).__name__}: {error}); choose a named one "
                f"({', '.join(NAMED_FORMATS)}) instead"
            ) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.text)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ConfigError(
                f"the chat template of {self.source} is not valid jinja2{line}: {error}; repair it, or choose a named "
                f"one ({', '.join(NAMED_FORMATS)})"
            ) from error


def named_template(name: str, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
    """One of the formats in `chat_formats`, for models that bring no template.

    Raises:
        UnsupportedError: no such name; lists them.
    """
    if name not in NAMED_FORMATS:
        raise UnsupportedError(f"chat template {name!r} is not known; accepted are {', '.join(NAMED_FORMATS)}")
    chosen = NAMED_FORMATS[name]
    tokens = {"bos_token": "", "eos_token": "", **(special_tokens or {})}
    return ChatTemplate(chosen.template, f"the named format {name!r}", chosen.stop, chosen.writes_bos, tokens)


def load_chat_template(folder: Path, special_tokens: Mapping[str, str], name: str | None = None) -> ChatTemplate | None:
    """The template that a model folder brings, or None.

    chat_template.jinja comes first, then chat_template.json, then `chat_template` of tokenizer_config.json, as in
    transformers. name: which of several (default: "default").

    Raises:
        ConfigError: a damaged file, an invalid template, or several templates of which none has that name.
    """
    found = _find_templates(folder)
    if found is None:
        return None
    source, templates = found
    wanted = name or ("default" if "default" in templates or len(templates) > 1 else next(iter(templates)))
    if wanted not in templates:
        raise ConfigError(f"{source} has no chat template named {wanted!r}; it has {', '.join(map(repr, templates))}")
    return ChatTemplate(templates[wanted], str(source), special_tokens=special_tokens)


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
        raise RequestError(f"messages must hold plain data only (text, numbers, lists, mappings): {error}") from error


def _find_templates(folder: Path) -> tuple[Path, dict[str, str]] | None:
    """(file, name -> template) of the first file that has any."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path, {"default": read_small_file(path).decode("utf-8")}
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
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


class _TemplateRefusal(Exception):
    """What `raise_exception` of a template raises."""


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks the assistant's text for training: passed through."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates are written for: that of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _raise_exception(message: str) -> None:
    raise _TemplateRefusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which templates do not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
