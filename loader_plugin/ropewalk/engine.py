"""Text in, text out: a model, its tokenizer and one cache.

    text -> ids -> generate.py -> ids -> text pieces, without stop strings

One request runs at a time. The cache outlives requests: a conversation that goes on computes only what is new.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ropewalk.adapter_request import AdapterUse, Request, checked_request
from ropewalk.chat import ChatTemplate, Message, load_chat_template, named_template
from ropewalk.chat_formats import NAMED_FORMATS
from ropewalk.errors import RequestError, UnsupportedError
from ropewalk.generate import (
    CacheLike,
    Cancelled,
    Generation,
    GenerationStats,
    ModelLike,
    Progress,
    Step,
    checked_prompt,
)
from ropewalk.routing import AUTO, Routing, route
from ropewalk.sampling import SamplingParams
from ropewalk.stops import StopStrings
from ropewalk.tokenizer import StreamDecoder, Tokenizer, check_tokenizer_fits

WAIT_STEP_S = 0.05  # how often a request that waits for another asks whether it is cancelled


class EngineModel(ModelLike, Protocol):
    """What the engine needs of a model."""

    def new_cache(self, max_seq_len: int | None = None) -> CacheLike: ...
    def accepts(self, cache: CacheLike) -> bool: ...


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole reply. finish_reason: "stop", "length", "context" or "cancelled"; steps: its tokens.

    routing: which adapter was chosen, where adapters="auto" was asked for.
    """

    text: str
    finish_reason: str
    steps: tuple[Step, ...]
    stats: GenerationStats
    routing: Routing | None = None

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the reply; where a stop string ended it, those of the stop string included."""
        return [step.token_id for step in self.steps]


class Engine:
    """Generates text. `last_stats` and `last_finish_reason` speak of the newest request that was started.

    chat_template: a name of `chat_formats` or a template; default: the one of the model's folder.

    Raises:
        ConfigError: the tokenizer belongs to another model. UnsupportedError: no chat template of that name.
    """

    def __init__(
        self, model: EngineModel, tokenizer: Tokenizer, chat_template: ChatTemplate | str | None = None
    ) -> None:
        check_tokenizer_fits(tokenizer, model.config.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.cache = model.new_cache()
        if isinstance(chat_template, str):
            chat_template = named_template(chat_template, tokenizer.special_tokens)
        self._chat_template = chat_template
        self._turn = threading.Lock()
        self._holder: int | None = None
        self._last: _Request | None = None
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.end_token_ids = tuple(dict.fromkeys((*model.config.eos_token_ids, *eos)))

    @property
    def chat_template(self) -> ChatTemplate:
        """The template of conversations.

        Raises:
            UnsupportedError: the model brings none and none was chosen. ConfigError: the one it brings is broken.
        """
        if self._chat_template is None:
            folder = self.tokenizer.source.parent
            self._chat_template = load_chat_template(folder, self.tokenizer.special_tokens)
        if self._chat_template is None:
            raise UnsupportedError(
                f"{self.tokenizer.source.parent} brings no chat template: choose one by name "
                f"({', '.join(NAMED_FORMATS)}), or use plain generation"
            )
        return self._chat_template

    @property
    def last_stats(self) -> GenerationStats | None:
        """Tokens and times of the newest request; None before it has begun."""
        generation = None if self._last is None else self._last.generation
        return None if generation is None else generation.stats

    @property
    def last_finish_reason(self) -> str | None:
        """How the newest request ended; None while it runs."""
        return None if self._last is None else self._last.finish_reason

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        adapters: Request | None = None,
    ) -> TextStream:
        """Continue a prompt; iterate over the result for pieces of text, or use its `steps`.

        prompt: text (the bos token is added where the tokenizer's files say so), or token ids as they are.
        cancelled: asked between the steps of the model; True ends the reply with what there is.
        progress: called with (tokens done, tokens to do) while the prompt is read.
        adapters: as for `Model.forward`, such as "storm+poet:0.5@10-11"; "auto" chooses the loaded adapter, or none,
            that finds the prompt least surprising, and reports it as `routing` of the stream.

        Raises:
            RequestError: the prompt is empty, does not fit, or holds unknown ids; adapters that are not loaded.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self._start(ids, params, cancelled, progress, adapters)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        adapters: Request | None = None,
    ) -> Completion:
        """The whole reply at once; arguments and errors as for `stream`."""
        return self.stream(prompt, params, cancelled, progress, adapters).complete()

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        adapters: Request | None = None,
        **variables: Any,
    ) -> TextStream:
        """The assistant's next turn, as a stream. `variables` are handed to the chat template, the rest is as for
        `stream`.

        Raises:
            RequestError: as for `stream`; messages that the template refuses. UnsupportedError: no chat template.
        """
        params = params or SamplingParams()
        params = replace(params, stop=tuple(dict.fromkeys(params.stop + self.chat_template.stop)))
        return self._start(self.chat_ids(messages, **variables), params, cancelled, progress, adapters)

    def chat_ids(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The prompt of a conversation in token ids, up to the beginning of the assistant's turn."""
        template = self.chat_template
        text = template.render(messages, **variables)
        return self.tokenizer.encode(text, add_bos=False if template.writes_bos else None)

    def _start(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None,
        cancelled: Cancelled | None,
        progress: Progress | None,
        adapters: Request | None,
    ) -> TextStream:
        params = params if params is not None else SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, got {type(params).__name__}")
        ids = checked_prompt(self.model, self.cache, prompt_ids)
        chosen = AUTO if isinstance(adapters, str) and adapters == AUTO else checked_request(adapters)
        self._last = _Request(ids, params, cancelled or (lambda: False), progress, chosen)
        return TextStream(self, self._last)

    def _acquire(self, cancelled: Callable[[], bool]) -> bool:
        """Wait for the turn; False if cancelled meanwhile."""
        if self._turn.locked() and self._holder == threading.get_ident():
            raise RequestError(
                "this engine is still busy with a stream that this thread began: exhaust it or close() it first"
            )
        while not self._turn.acquire(timeout=WAIT_STEP_S):
            if cancelled():
                return False
        self._holder = threading.get_ident()
        return True

    def _release(self) -> None:
        self._holder = None
        self._turn.release()


@dataclass(slots=True)
class _Request:
    """One request as it proceeds. Apart from its stream, so that a stream that is dropped ends at once."""

    prompt_ids: list[int]
    params: SamplingParams
    cancelled: Cancelled
    progress: Progress | None
    adapters: str | tuple[AdapterUse, ...]
    routing: Routing | None = None
    generation: Generation | None = None
    finish_reason: str | None = None
    stop_string: str | None = None
    steps: list[Step] = field(default_factory=list)


class TextStream(Iterator[str]):
    """The pieces of one reply. Holds the engine from the first piece to the end, to `close()`, or until dropped."""

    def __init__(self, engine: Engine, request: _Request) -> None:
        self._request = request
        self._pieces = _pieces(engine, request)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The tokens so far."""
        return tuple(self._request.steps)

    @property
    def stats(self) -> GenerationStats | None:
        """Tokens and times so far; None before the request has begun."""
        return None if self._request.generation is None else self._request.generation.stats

    @property
    def routing(self) -> Routing | None:
        """The adapter chosen and all scores, where adapters="auto" was asked for and the request has begun."""
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
        """End early; the engine is free for the next request."""
        self._pieces.close()
        self._request.finish_reason = self._request.finish_reason or "cancelled"

    def complete(self) -> Completion:
        """Run to the end."""
        text = "".join(self)
        return Completion(text, self.finish_reason, self.steps, self.stats, self.routing)


def _pieces(engine: Engine, request: _Request) -> Iterator[str]:
    """The text of a request, piece by piece, with the engine held meanwhile."""
    if not engine._acquire(request.cancelled):
        request.finish_reason = "cancelled"
        return
    try:
        if not engine.model.accepts(engine.cache):  # the layer order was changed
            engine.cache = engine.model.new_cache(engine.cache.capacity)
        adapters = request.adapters
        if adapters == AUTO:
            request.routing = route(engine.model, request.prompt_ids, request.cancelled)
            if request.routing is None:
                request.finish_reason = "cancelled"
                return
            adapters = request.routing.adapters
        request.generation = Generation(
            engine.model,
            engine.cache,
            request.prompt_ids,
            request.params,
            engine.end_token_ids,
            request.cancelled,
            request.progress,
            adapters,
        )
        yield from _shown_text(engine.tokenizer, request)
    except GeneratorExit:
        request.finish_reason = "cancelled"
        raise
    finally:
        if request.generation is not None:
            request.generation.close()
        engine._release()


def _shown_text(tokenizer: Tokenizer, request: _Request) -> Iterator[str]:
    decoder = StreamDecoder(tokenizer, context_ids=request.prompt_ids)
    stops = StopStrings(request.params.stop)
    for step in request.generation:
        request.steps.append(step)
        shown = stops.push(decoder.push(step.token_id))
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
