"""Chat templates by the names that the page shows, and the prompt that one makes of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.text.chat import ChatTemplate, Message, load_chat_template, named_template
from ropewalk.text.chat_formats import NAMED_FORMATS
from ropewalk.text.tokenizer.load import Tokenizer

FROM_CHECKPOINT = "of the checkpoint"
PLAIN = "plain text"  # for models that were never taught to chat: the texts one after the other
ALL_TEMPLATES = (FROM_CHECKPOINT, PLAIN, *NAMED_FORMATS)
_PLAIN_TEMPLATE = "{%- for message in messages -%}{{ message['content'] }}{{ '\\n' }}{%- endfor -%}"


def template_names(tokenizer: Tokenizer) -> list[str]:
    """What can be chosen for a model, what suits it best first."""
    own = [FROM_CHECKPOINT] if _own_template(tokenizer) is not None else []
    return [*own, PLAIN, *NAMED_FORMATS]


def chat_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of that name; "" is the first of `template_names`.

    Raises:
        UnsupportedError: no such name, or the checkpoint brings none. ConfigError: the one it brings is broken.
    """
    name = name or template_names(tokenizer)[0]
    if name == PLAIN:
        return ChatTemplate(_PLAIN_TEMPLATE, "the plain text format", writes_bos=False)
    if name != FROM_CHECKPOINT:
        return named_template(name, tokenizer.special_tokens)
    own = load_chat_template(tokenizer.source.parent, tokenizer.special_tokens)
    if own is None:
        raise UnsupportedError(f"the checkpoint brings no chat template: choose one of {', '.join(NAMED_FORMATS)}")
    return own


def prompt_ids(tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
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
