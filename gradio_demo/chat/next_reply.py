"""A conversation's next reply: what is sent to the model when it no longer fits, and what is shown meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ropewalk.base.errors import RequestError
from ropewalk.engine.shorten import limit_of_strides
from ropewalk.generate.context_shift import SINKS
from ropewalk.generate.sampling import SamplingParams
from ropewalk.gradio_demo.chat.conversations import Conversation, Turn
from ropewalk.gradio_demo.model_bar.workbench import Loaded
from ropewalk.gradio_demo.replies.reply import DONE, Reply, start_reply
from ropewalk.gradio_demo.replies.request import DROP, SHIFT, STOP, ReplyRequest, with_stop
from ropewalk.gradio_demo.replies.status import Meter, describe, meter
from ropewalk.gradio_demo.replies.templates import chat_template, prompt_ids
from ropewalk.model.cache import common_length
from ropewalk.text.chat import Template
from ropewalk.text.tokenizer.load import Tokenizer

LEAST_ROOM = 16  # tokens that a reply must at least have room for


@dataclass(frozen=True, slots=True)
class ChatView:
    """What the page shows at one moment. running: the reply is not finished; line: about tokens and speed."""

    conversation: Conversation
    line: str
    meter: Meter
    running: bool = False
    error: str | None = None


def make_reply(
    loaded: Loaded, conversation: Conversation, request: ReplyRequest, person: str | None = None
) -> tuple[Reply, int]:
    """(the reply to a conversation that ends with a question, how many of its oldest turns are left out).

    Raises:
        RequestError: it does not fit and may not be shortened, or the template refuses it. Others as `chat_template`.
    """
    template = chat_template(conversation.template, loaded.engine)
    room = _room(request.params, loaded.model.max_seq_len)
    ids, dropped = fitting_prompt(
        loaded.tokenizer, template, conversation, loaded.model.max_seq_len - room, request.overflow
    )
    params = with_stop(request.params, template.stop)
    keep = _opening(loaded.tokenizer, template, conversation) if request.overflow == SHIFT else False
    return start_reply(loaded.engine, ids, params, request.adapters, person, keep), dropped


def fitting_prompt(
    tokenizer: Tokenizer, template: Template, conversation: Conversation, limit: int, overflow: str
) -> tuple[list[int], int]:
    """(prompt of at most `limit` tokens, number of the oldest turns left out of it).

    Raises:
        RequestError: it is longer and may not be shortened, or no question would be left.
    """
    turns, dropped = conversation.turns, 0
    most = limit
    while True:
        ids = prompt_ids(tokenizer, template, replace(conversation, turns=turns).messages)
        if len(ids) <= limit:
            return ids, dropped
        if overflow == SHIFT and not dropped:
            limit = limit_of_strides(most, len(ids))
        keep = next((i for i, turn in enumerate(turns[1:], 1) if turn.role == "user"), None)
        if overflow == STOP or keep is None:
            if len(ids) <= most:
                return ids, dropped
            raise RequestError(_too_long(len(ids), most, overflow))
        turns, dropped = turns[keep:], dropped + keep


def follow_chat(reply: Reply, dropped: int, conversation: Conversation, size: int) -> Iterator[ChatView]:
    """The conversation with the reply as it grows; in the last view it is one of its turns, with its line."""
    for snapshot in reply.follow():
        line = describe(snapshot, dropped)
        if snapshot.phase != DONE or snapshot.text:
            grown = conversation.with_turn(
                Turn("assistant", snapshot.text.strip("\n"), line if snapshot.phase == DONE else "")
            )
        else:
            grown = conversation
        yield ChatView(grown, line, meter(snapshot.stats, size), snapshot.phase != DONE, snapshot.error)


def _room(params: SamplingParams, size: int) -> int:
    """Positions kept free for the reply: as many as it may have, but never more than a quarter of the context."""
    return max(min(params.max_new_tokens or size, size // 4), min(LEAST_ROOM, size - 1))


def _opening(tokenizer: Tokenizer, template: Template, conversation: Conversation) -> int:
    """How many tokens stand before the first turn: the system prompt, or at least the first few."""
    one, other = (
        prompt_ids(tokenizer, template, replace(conversation, turns=(Turn("user", text),)).messages)
        for text in ("a", "0")
    )
    return max(common_length(one, other), SINKS)


def _too_long(length: int, limit: int, overflow: str) -> str:
    advice = (
        "shorten the question, or load the model with a longer context"
        if overflow != STOP
        else f"start a new conversation, or choose to {DROP}"
    )
    return f"the conversation has {length} tokens and {limit} fit beside a reply: {advice}"
