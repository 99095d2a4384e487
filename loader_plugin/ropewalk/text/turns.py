"""Conversations as turns of text, and how those are normalised that are not "a system text, then user and assistant
alternating": role-playing programs send several system messages, let the assistant greet first, or repeat a role.

No text is lost: consecutive turns of one role become one, with a blank line between their texts; messages without text
are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.base.errors import RequestError
from ropewalk.base.json import shown

Message = Mapping[str, Any]

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. role: one of ROLES."""

    role: str
    text: str


def plain_turns(messages: Sequence[Message]) -> list[Turn]:
    """Messages of text, one turn each.

    Raises:
        RequestError: an unknown role, or content that is not text.
    """
    turns = []
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise RequestError(f"message {number} has the role {shown(role)}; this format knows {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise RequestError(f"message {number} (role {role!r}) must have text as content, found {shown(content)}")
        turns.append(Turn(role, content))
    return turns


def joined(turns: Sequence[Turn]) -> list[Turn]:
    """Consecutive turns of one role as one turn; turns without text are left out."""
    result: list[Turn] = []
    for turn in turns:
        if not turn.text.strip():
            continue
        if result and result[-1].role == turn.role:
            turn = Turn(turn.role, f"{result.pop().text}\n\n{turn.text}")
        result.append(turn)
    return result


def opening_and_rest(turns: Sequence[Turn]) -> tuple[str | None, list[Turn]]:
    """(the system text in front, or None; the turns after it), joined."""
    turns = joined(turns)
    if turns and turns[0].role == SYSTEM:
        return turns[0].text, turns[1:]
    return None, turns


def alternating(turns: Sequence[Turn]) -> tuple[str | None, list[Turn]]:
    """(the system text in front, or None; alternating turns of user and assistant, at least one, the user's first).

    Later system texts become user turns, joined with those next to them. If the assistant speaks first, an empty user
    turn is put before it.
    """
    opening, rest = opening_and_rest(turns)
    rest = joined([Turn(USER if turn.role == SYSTEM else turn.role, turn.text) for turn in rest])
    if not rest or rest[0].role != USER:
        rest.insert(0, Turn(USER, ""))
    return opening, rest


def stricter_messages(messages: Sequence[Message]) -> Iterator[list[dict[str, str]]]:
    """Forms of the conversation that a template which refuses it may still accept, the closest first; none if it is
    not all plain text (tool calls and their results have an order of their own).

    First the form of `alternating`, then the same with the system text as the beginning of the first user turn.
    """
    if any(set(message) - {"role", "content", "name"} for message in messages):
        return
    try:
        turns = plain_turns(messages)
    except RequestError:
        return
    opening, rest = alternating(turns)
    system = [] if opening is None else [Turn(SYSTEM, opening)]
    yield _messages([*system, *rest])
    if opening is not None:
        yield _messages(joined([Turn(USER, opening), *rest]))


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]
