"""A stream of server-sent events that goes on from another replica where one was lost.

The second replica writes the same reply from its first token: the request has a seed, and results do not depend on
where they are computed. So what the client has already got is cut off the front of the second stream, and what remains
goes out under the id of the first. Only whole events are passed on, and nothing is parsed while no replica is lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ropewalk.base.errors import RopewalkError

DONE = b"data: [DONE]\n\n"
_DATA = b"data: "
_END = b"\n\n"
_PARALLEL = ("tokens", "token_logprobs", "top_logprobs", "text_offset")  # the lists of a text completion's logprobs
SHUTTING_DOWN = b'"shutting_down"'  # the code of the error by which a replica says that it ends

Json = dict[str, Any]


class StreamsDiffer(RopewalkError, RuntimeError):
    """The second reply does not begin with what the client has got of the first."""


@dataclass(slots=True)
class _Choice:
    """What the client has got of one choice. num_tokens: those whose log probabilities it has."""

    text: str = ""
    num_tokens: int = 0
    is_open: bool = False
    is_finished: bool = False


@dataclass(slots=True)
class _Got:
    """What the client has got. head: the fields that every chunk has; None before the first one."""

    head: Json | None = None
    choices: dict[int, _Choice] = field(default_factory=dict)
    has_usage: bool = False

    def add_(self, chunk: Json) -> None:
        """Count a chunk that was sent."""
        if self.head is None:
            self.head = {"id": chunk["id"], "created": chunk["created"]}
        self.has_usage = self.has_usage or chunk.get("usage") is not None
        for choice in chunk["choices"]:
            got = self.choices.setdefault(choice["index"], _Choice())
            got.text += _text_of(choice)
            got.num_tokens += len(_tokens_of(choice))
            got.is_open = got.is_open or "role" in choice.get("delta", ())
            got.is_finished = got.is_finished or choice["finish_reason"] is not None


class ReplyStream:
    """The events of one reply, from one replica after another."""

    def __init__(self) -> None:
        self._tail = b""  # of an event that has not come to its end
        self._sent: list[bytes] = []
        self._cut: _Cut | None = None
        self.is_complete = False

    def push(self, data: bytes) -> bytes:
        """What of it is new for the client: whole events, perhaps none.

        Raises:
            StreamsDiffer: after `restart_`. ReplicaEnds: the replica ends the reply because it is about to end itself.
        """
        data = self._tail + data
        end = data.rfind(_END) + len(_END)
        if end < len(_END):
            self._tail = data
            return b""
        whole, self._tail = data[:end], data[end:]
        if whole.startswith(b'data: {"error"') and SHUTTING_DOWN in whole:
            raise ReplicaEnds("the replica is shutting down")
        if self._cut is not None:
            whole = b"".join(self._cut.new_part(event + _END) for event in whole.split(_END)[:-1])
        self._sent.append(whole)
        self.is_complete = self.is_complete or whole.endswith(DONE)
        return whole

    @property
    def has_begun(self) -> bool:
        """Whether the client has got something."""
        return any(self._sent)

    def restart_(self) -> None:
        """The next data comes from the beginning of another replica's stream."""
        self._tail = b""
        got = _Got()
        for chunk in _chunks(b"".join(self._sent)):
            got.add_(chunk)
        self._cut = _Cut(got)


class ReplicaEnds(RopewalkError, RuntimeError):
    """A replica says itself that it cannot finish a reply, as it is being stopped."""


class _Cut:
    """Takes off a stream what the client has. In each choice, so much text and so many tokens are left to skip."""

    def __init__(self, got: _Got) -> None:
        self._got = got
        self._texts = {index: choice.text for index, choice in got.choices.items()}
        self._tokens = {index: choice.num_tokens for index, choice in got.choices.items()}

    def new_part(self, event: bytes) -> bytes:
        """The event without what the client has; empty if it has it all."""
        if not event.startswith(_DATA) or event == DONE:
            return event
        chunk = json.loads(event[len(_DATA) :])
        if "error" in chunk:
            return event
        had_choices = bool(chunk["choices"])
        chunk["choices"] = [choice for choice in chunk["choices"] if self._cut_(choice)]
        if self._got.head is not None:
            chunk |= self._got.head
        if not chunk["choices"] and (had_choices or self._got.has_usage):
            return b""
        return _DATA + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + _END

    def _cut_(self, choice: Json) -> bool:
        """Shorten a choice; whether anything of it is new."""
        index = choice["index"]
        got = self._got.choices.get(index)
        if got is None:
            return True
        self._skip_text_(choice, index)
        num_skipped = min(self._tokens[index], len(_tokens_of(choice)))
        self._tokens[index] -= num_skipped
        if num_skipped:
            _drop_tokens_(choice, num_skipped)
        if "role" in choice.get("delta", ()):
            return not got.is_open
        finishes = choice["finish_reason"] is not None
        return bool(_text_of(choice) or _tokens_of(choice)) or (finishes and not got.is_finished)

    def _skip_text_(self, choice: Json, index: int) -> None:
        text, known = _text_of(choice), self._texts[index]
        common = min(len(text), len(known))
        if text[:common] != known[:common]:
            raise StreamsDiffer("the reply of another replica differs from what was sent of the first")
        self._texts[index] = known[common:]
        if common:
            _set_text_(choice, text[common:])


def _chunks(events: bytes) -> list[Json]:
    lines = (event for event in events.split(_END) if event.startswith(_DATA) and event + _END != DONE)
    chunks = (json.loads(line[len(_DATA) :]) for line in lines)
    return [chunk for chunk in chunks if "error" not in chunk]


def _text_of(choice: Json) -> str:
    return choice["delta"].get("content") or "" if "delta" in choice else choice["text"]


def _set_text_(choice: Json, text: str) -> None:
    if "delta" in choice:
        choice["delta"]["content"] = text
    else:
        choice["text"] = text


def _tokens_of(choice: Json) -> list[Any]:
    logprobs = choice.get("logprobs") or {}
    return logprobs.get("content") or logprobs.get("tokens") or []


def _drop_tokens_(choice: Json, count: int) -> None:
    logprobs = choice["logprobs"]
    for name in ("content",) if "content" in logprobs else _PARALLEL:
        logprobs[name] = logprobs[name][count:]
