"""Chat templates by the names that the page shows, and the prompt that one makes of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.engine.engine import Engine
from ropewalk.text.chat import ChatTemplate, Message, Template, load_chat_template, named_template
from ropewalk.text.chat_formats import CONTINUED_TEXT, FALLBACK, NAMED_FORMATS
from ropewalk.text.tokenizer.load import Tokenizer

FROM_CHECKPOINT = "of the checkpoint"
CLOSED_CONTEXT = "airoboros"
PLAIN = "plain text"  # the page's word for `CONTINUED_TEXT`, which saved conversations hold
_FORMATS = {PLAIN if name == CONTINUED_TEXT else name: name for name in NAMED_FORMATS}
ALL_TEMPLATES = (FROM_CHECKPOINT, PLAIN, *(shown for shown in _FORMATS if shown != PLAIN))


def template_names(tokenizer: Tokenizer) -> list[str]:
    """What can be chosen for a model, the most suitable first: its own, else what the other faces fall back to."""
    best = FALLBACK if _own_template(tokenizer) is None else FROM_CHECKPOINT
    return [best, *(name for name in ALL_TEMPLATES if name not in (best, FROM_CHECKPOINT))]


def closed_context_template(tokenizer: Tokenizer) -> str:
    """What questions to documents are wrapped in: the model's own template, else that of the models that the closed
    context comes from, which were published without one."""
    first = template_names(tokenizer)[0]
    return first if first == FROM_CHECKPOINT else CLOSED_CONTEXT


def chat_template(name: str, engine: Engine) -> Template:
    """The template of that name; "" is the first of `template_names`. The checkpoint's own is the engine's.

    Raises:
        UnsupportedError: no such name, or the checkpoint has no template. ConfigError: its template is broken.
    """
    tokenizer = engine.tokenizer
    name = name or template_names(tokenizer)[0]
    if name != FROM_CHECKPOINT:
        return named_template(_FORMATS.get(name, name), tokenizer.special_tokens)
    if load_chat_template(tokenizer.source.parent, tokenizer.special_tokens) is None:
        raise UnsupportedError(f"the checkpoint brings no chat template: choose one of {', '.join(_FORMATS)}")
    return engine.chat_template


def prompt_ids(tokenizer: Tokenizer, template: Template, messages: Sequence[Message]) -> list[int]:
    """The prompt of a conversation in token ids, up to the beginning of the assistant's turn.

    Raises:
        RequestError: the template refuses the messages.
    """
    text = template.render(messages)
    return tokenizer.encode(text, add_bos=False if template.writes_bos else None)


def _own_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """A broken one counts as none here: choosing it by name says what is wrong with it."""
    try:
        return load_chat_template(tokenizer.source.parent, tokenizer.special_tokens)
    except ConfigError:
        return None
