"""Replies in OpenAI's shapes: whole, and as the chunks of a stream.

The two endpoints differ in names only: `ChatShape` and `TextShape` say how a choice is written.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ropewalk import __version__
from ropewalk.engine.kept_folder import SUFFIX
from ropewalk.faces.server.jobs import Event, Finished, Piece
from ropewalk.faces.server.requests import Work
from ropewalk.generate.generate import Step
from ropewalk.text.tokenizer.load import Tokenizer

FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}
Tokens = Sequence[tuple[Step, str]]
Json = dict[str, Any]


class Shape(Protocol):
    """How an endpoint writes its choices."""

    @property
    def prefix(self) -> str: ...
    @property
    def whole(self) -> str: ...
    @property
    def chunk(self) -> str: ...
    def first_chunks(self, num_choices: int) -> list[Json]: ...
    def delta(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json: ...
    def message(self, index: int, text: str, logprobs: Json | None, reason: str) -> Json: ...
    def logprobs(self, tokens: Tokens, start: int) -> Json: ...
    def joined(self, parts: Sequence[Json]) -> Json: ...


@dataclass(frozen=True, slots=True)
class ChatShape:
    """/v1/chat/completions."""

    tokenizer: Tokenizer
    prefix: str = "chatcmpl"
    whole: str = "chat.completion"
    chunk: str = "chat.completion.chunk"

    def first_chunks(self, num_choices: int) -> list[Json]:
        """Each choice begins with its role."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(num_choices)]

    def delta(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        """A choice of a chunk."""
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def message(self, index: int, text: str, logprobs: Json | None, reason: str) -> Json:
        """A choice of a whole reply."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, tokens: Tokens, start: int) -> Json:
        """One entry per token, with its alternatives."""
        entries = [
            self._entry(step.token_id, step.logprob) | {"top_logprobs": [self._entry(*one) for one in step.top]}
            for step, _ in tokens
        ]
        return {"content": entries, "refusal": None}

    def joined(self, parts: Sequence[Json]) -> Json:
        """The log probabilities of several pieces as one."""
        return {"content": [entry for part in parts for entry in part["content"]], "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> Json:
        data = self.tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


@dataclass(frozen=True, slots=True)
class TextShape:
    """/v1/completions."""

    tokenizer: Tokenizer
    prefix: str = "cmpl"
    whole: str = "text_completion"
    chunk: str = "text_completion"

    def first_chunks(self, num_choices: int) -> list[Json]:
        """Nothing comes before the text."""
        return []

    def delta(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        """A choice of a chunk."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    message = delta

    def logprobs(self, tokens: Tokens, start: int) -> Json:
        """Parallel lists. text_offset: where each token begins in the text, the first of them at character `start`."""
        offsets = []
        for _, text in tokens:
            offsets.append(start)
            start += len(text)
        return {
            "tokens": [self._text(step.token_id) for step, _ in tokens],
            "token_logprobs": [step.logprob for step, _ in tokens],
            "top_logprobs": [self._alternatives(step) for step, _ in tokens],
            "text_offset": offsets,
        }

    def joined(self, parts: Sequence[Json]) -> Json:
        """The log probabilities of several pieces as one."""
        return {key: [value for part in parts for value in part[key]] for key in self.logprobs((), 0)}

    def _alternatives(self, step: Step) -> Json | None:
        """The most likely tokens, and the one that was chosen if it is not among them. The first token of an echoed
        prompt has none: nothing comes before it."""
        if step.logprob is None:
            return None
        return {self._text(token_id): logprob for token_id, logprob in (*step.top, (step.token_id, step.logprob))}

    def _text(self, token_id: int) -> str:
        """A token as OpenAI writes it; if it is not text by itself: "bytes:\\xf0"."""
        data = self.tokenizer.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(slots=True)
class ReplyWriter:
    """Writes the replies to one request as its events come in."""

    work: Work
    shape: Shape
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    finished: dict[int, Finished] = field(default_factory=dict)
    _texts: dict[int, list[str]] = field(default_factory=dict)
    _logprobs: dict[int, list[Json]] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{self.shape.prefix}-{uuid.uuid4().hex}"

    @property
    def usage(self) -> Json:
        """Tokens of all replies that are finished; a prompt with several replies counts once."""
        prompts: dict[int, Finished] = {}
        for index, done in sorted(self.finished.items()):
            prompts.setdefault(id(self.work.choices[index].prompt_ids), done)
        prompt = sum(first.stats.prompt_tokens for first in prompts.values())
        completion = sum(done.num_tokens for done in self.finished.values())
        guessed = sum(done.stats.guessed_tokens for done in self.finished.values())
        accepted = sum(done.stats.accepted_tokens for done in self.finished.values())
        guesses = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": guessed - accepted}
        details = {"completion_tokens_details": guesses} if guessed else {}
        cached = {"cached_tokens": sum(first.cached_tokens for first in prompts.values())}
        shifted = sum(done.stats.shifted_tokens for done in self.finished.values())
        if shifted:  # moved down in the cache instead of read again
            cached["shifted_tokens"] = shifted
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": cached,
            **details,
        }

    def opening(self) -> list[Json]:
        """The chunks before any text."""
        return [self._chunk([choice]) for choice in self.shape.first_chunks(len(self.work.choices))]

    def chunk(self, event: Piece | Finished) -> Json:
        """The chunk of an event."""
        logprobs = self._take_logprobs(event)
        if isinstance(event, Piece):
            return self._chunk([self.shape.delta(event.index, event.text, logprobs, None)])
        self.finished[event.index] = event
        return self._chunk([self.shape.delta(event.index, "", logprobs, FINISH_REASONS[event.reason])]) | _kept(event)

    def closing(self) -> list[Json]:
        """The chunks after all replies."""
        return [self._chunk([]) | {"usage": self.usage}] if self.work.wants_usage else []

    def collect(self, event: Event) -> None:
        """Keep an event for `whole`."""
        if isinstance(event, (Piece, Finished)):
            logprobs = self._take_logprobs(event)
            if logprobs is not None:
                self._logprobs.setdefault(event.index, []).append(logprobs)
        if isinstance(event, Piece):
            self._texts.setdefault(event.index, []).append(event.text)
        elif isinstance(event, Finished):
            self.finished[event.index] = event

    def whole(self) -> Json:
        """The reply in one piece."""
        choices = []
        for index, done in sorted(self.finished.items()):
            text = "".join(self._texts.get(index, ()))
            parts = self._logprobs.get(index)
            logprobs = None if parts is None else self.shape.joined(parts)
            choices.append(self.shape.message(index, text, logprobs, FINISH_REASONS[done.reason]))
        kept = _kept(self.finished[0]) if 0 in self.finished else {}
        return self._head(self.shape.whole) | {"choices": choices, "usage": self.usage} | kept

    def _take_logprobs(self, event: Piece | Finished) -> Json | None:
        """The log probabilities of an event's tokens, if they are requested."""
        choice = self.work.choices[event.index]
        if choice.params.logprobs is None:
            return None
        start = self._offsets.get(event.index, 0)
        self._offsets[event.index] = start + sum(len(text) for _, text in event.tokens)
        return self.shape.logprobs(event.tokens, start)

    def _chunk(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self.work.wants_usage else {}
        return self._head(self.shape.chunk) | {"choices": choices} | usage

    def _head(self, kind: str) -> Json:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.work.model}
        return head | {"system_fingerprint": f"ropewalk-{__version__}"}


def _kept(done: Finished) -> Json:
    """The file of the prompt, if it was to be kept."""
    kept = done.kept
    if kept is None:
        return {}
    name = kept.path.name.removesuffix(SUFFIX)
    return {"kept": {"id": name, "object": "cache", "tokens": kept.num_tokens, "bytes": kept.num_bytes}}
