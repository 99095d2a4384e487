"""One reply as text: the state of its request, and the stream of pieces that a caller iterates over."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ropewalk.adapters.request import AdapterUse
from ropewalk.engine.turn_queue import Ticket
from ropewalk.generate.context_shift import ContextShift
from ropewalk.generate.generate import Cancelled, Generation, GenerationStats, Progress, Step
from ropewalk.generate.routing import Routing
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.plan import INTERACTIVE
from ropewalk.generate.stops import StopStrings
from ropewalk.text.tokenizer.load import StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole reply. finish_reason: "stop", "length", "context" or "cancelled"; steps: its tokens.

    routing: which adapter was chosen, if adapters="auto" was requested.
    """

    text: str
    finish_reason: str
    steps: tuple[Step, ...]
    stats: GenerationStats
    routing: Routing | None = None

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the reply, including those of a stop string that ended it."""
        return [step.token_id for step in self.steps]


@dataclass(slots=True)
class TextRequest:
    """The state of one request. Kept apart from its stream, so that nothing holds a stream that the caller drops.

    ticket: the caller's place in the queue, if it has one. client, priority: who asks, and how urgently. shift: whether
    the oldest tokens go at the end of the window. dropped_messages: of a conversation, for want of room. copies: the
    cache of the prompt is wanted, as prompt_cache. token_texts: the text that each step added.
    """

    prompt_ids: list[int]
    params: SamplingParams
    cancelled: Cancelled
    progress: Progress | None
    adapters: str | tuple[AdapterUse, ...]
    ticket: Ticket | None = None
    client: Hashable = None
    priority: str = INTERACTIVE
    shift: ContextShift | None = None
    dropped_messages: int = 0
    queue_s: float = 0.0
    routing: Routing | None = None
    generation: Generation | None = None
    finish_reason: str | None = None
    stop_string: str | None = None
    copies: bool = False
    prompt_cache: Any = None
    steps: list[Step] = field(default_factory=list)
    token_texts: list[str] = field(default_factory=list)


class TextStream(Iterator[str]):
    """The pieces of one reply. Holds a turn of the engine from its first piece until it ends, is closed or is
    dropped."""

    def __init__(self, request: TextRequest, pieces: Iterator[str]) -> None:
        self._request = request
        self._pieces = pieces

    def keep_prompt(self) -> None:
        """Have `prompt_cache` after the reply. To be called before its first piece."""
        self._request.copies = True

    @property
    def prompt_cache(self) -> Any:
        """What was read of the prompt, in a cache (`model.KvCache`) of its own, once the reply has ended; None if it
        ended before that, or nobody asked for it (`keep_prompt`)."""
        return self._request.prompt_cache

    @property
    def steps(self) -> tuple[Step, ...]:
        """The tokens so far."""
        return tuple(self._request.steps)

    def tokens(self, start: int = 0) -> list[tuple[Step, str]]:
        """The tokens from index `start` on, each with the text that it added.

        A token that ends within a character adds none of it; the token that completes it adds all of it. Stop strings
        are included.
        """
        return list(zip(self._request.steps[start:], self._request.token_texts[start:], strict=True))

    @property
    def stats(self) -> GenerationStats | None:
        """Tokens and times so far; None before the request has begun."""
        return None if self._request.generation is None else self._request.generation.stats

    @property
    def queue_s(self) -> float:
        """How long the request waited for its turn, from when its first piece was requested."""
        return self._request.queue_s

    @property
    def dropped_messages(self) -> int:
        """How many of the oldest messages of the conversation were left out, for want of room."""
        return self._request.dropped_messages

    @property
    def routing(self) -> Routing | None:
        """The adapter chosen, with all scores, if adapters="auto" was requested and the request has begun."""
        return self._request.routing

    @property
    def finish_reason(self) -> str | None:
        """None while it runs; "stop", "length", "context" or "cancelled"."""
        return self._request.finish_reason

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the reply, if one did."""
        return self._request.stop_string

    def __next__(self) -> str:
        # Entered for each piece: held across a yield it would leak into the caller's own code.
        with torch.inference_mode():
            return next(self._pieces)

    def close(self) -> None:
        """End early; the turn goes to the next request."""
        self._pieces.close()
        self._request.finish_reason = self._request.finish_reason or "cancelled"

    def complete(self) -> Completion:
        """Run to the end."""
        text = "".join(self)
        return Completion(text, self.finish_reason, self.steps, self.stats, self.routing)


def shown_text(tokenizer: Tokenizer, request: TextRequest, steps: Iterator[Step]) -> Iterator[str]:
    """The text of the steps, piece by piece and without stop strings; the request then knows how its reply ended."""
    decoder = StreamDecoder(tokenizer, context_ids=request.prompt_ids)
    stops = StopStrings(request.params.stop)
    for step in steps:
        text = decoder.push(step.token_id)
        request.steps.append(step)
        request.token_texts.append(text)
        shown = stops.push(text)
        if stops.found is not None:
            break
        if shown:
            yield shown
    else:
        shown = stops.push(decoder.flush())
    request.stop_string = stops.found
    request.finish_reason = "stop" if stops.found is not None else request.generation.finish_reason
    shown += stops.flush()
    if shown:
        yield shown
