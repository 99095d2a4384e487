"""A conversation's next reply: what is sent to the model when it no longer fits, and what is shown meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ropewalk.base.errors import RequestError
from ropewalk.engine.shorten import first_that_fits, limit_of_strides
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

    def prompt(start: int) -> list[int]:
        shorter = replace(conversation, turns=conversation.turns[start:])
        return prompt_ids(tokenizer, template, shorter.messages)

    ids = prompt(0)
    if len(ids) <= limit:
        return ids, 0
    starts = [number for number, turn in enumerate(conversation.turns) if number and turn.role == "user"]
    if overflow == STOP or not starts:
        raise RequestError(_too_long(len(ids), limit, overflow))
    wanted = limit_of_strides(limit, len(ids)) if overflow == SHIFT else limit
    start = first_that_fits(starts, lambda start: len(prompt(start)) <= wanted)
    ids = prompt(start)
    if len(ids) > limit:
        raise RequestError(_too_long(len(ids), limit, overflow))
    return ids, start


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
