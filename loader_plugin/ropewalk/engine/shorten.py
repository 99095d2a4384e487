"""Conversations that outgrow the window: the oldest turns go, in strides, and what stands before them stays.

    system | turn 1 | turn 2 | turn 3 | question    ->    system | turn 3 | question

A front end that holds a whole conversation asks for it anew with every question. What goes depends on the conversation
alone, so the next question drops the same turns, until the next stride is due: then `find_removed` (model/shift.py)
sees which stretch is missing, and the rest is shifted instead of read again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ropewalk.text.chat import Message

if TYPE_CHECKING:
    from ropewalk.engine.engine import Engine

REPLY_TOKENS = 512  # room for a reply whose length is not limited,
REPLY_PART = 4  # but no more than this part of the window
STRIDES = 4  # of what fits: so much goes at once, lest every question shifts the rest


def shortened(
    engine: Engine, messages: Sequence[Message], max_new_tokens: int | None, **variables: Any
) -> tuple[list[Message], int]:
    """(the messages without the oldest turns, how many messages went), so that a reply fits after them.

    Leading system messages stay, and the last message does in any case.

    Raises:
        Errors of the chat template, as `Engine.chat_ids`.
    """
    capacity = engine.context_size
    room = min(max_new_tokens or REPLY_TOKENS, capacity // REPLY_PART)
    whole = list(messages)
    first = num_opening(whole)
    excess = _length(engine, whole, variables) - (capacity - room)
    if excess <= 0 or len(whole) - first < 2:
        return whole, 0
    limit = limit_of_strides(capacity - room, capacity - room + excess)
    starts = [place for place in range(first + 1, len(whole)) if whole[place].get("role") == "user"]
    starts = starts or [len(whole) - 1]
    start = first_that_fits(starts, lambda start: _length(engine, whole[:first] + whole[start:], variables) <= limit)
    return whole[:first] + whole[start:], start - first


def first_that_fits(starts: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The first of `starts` with which it fits, else the last. What fits from one start fits from all later ones, so
    thousands are tried in a dozen steps."""
    return starts[bisect_left(starts, True, 0, len(starts) - 1, key=fits)]


def limit_of_strides(most: int, length: int) -> int:
    """The most tokens that are to be left of a prompt of that length, of which `most` fit: whole strides go.

    So a conversation that grows loses the same turns again, until the next stride is due.
    """
    stride = max(most // STRIDES, 1)
    return length - -(-(length - most) // stride) * stride


def num_opening(messages: Sequence[Message]) -> int:
    """How many system messages stand at the start."""
    roles = [message.get("role") for message in messages]
    return next((place for place, role in enumerate(roles) if role not in ("system", "developer")), len(roles))


def num_opening_tokens(engine: Engine, messages: Sequence[Message], **variables: Any) -> int:
    """How many tokens stand before the first turn: where prompts that differ in that turn alone begin to differ."""
    opening = list(messages[: num_opening(messages)])
    variables.pop("continue_final_message", None)
    one, other = (engine.chat_ids([*opening, {"role": "user", "content": text}], **variables) for text in ("a", "0"))
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)


def _length(engine: Engine, messages: Sequence[Message], variables: dict[str, Any]) -> int:
    """The tokens of a prompt, or of one that is far too long something that says so."""
    text = engine.chat_text(messages, **variables)
    return len(engine.tokenizer.encode(text, add_bos=False if engine.chat_template.writes_bos else None))
