"""Text in, text out: a model, its tokenizer and some caches.

    text -> ids -> queue -> cache -> generate/generate.py -> ids -> pieces of text, without stop strings

As many requests run at once as there are caches; the others wait in order of arrival. Running requests take turns, one
step each (a token, or a layer of a prompt), so all of them make progress, and each gets the same tokens as if it ran
alone. Caches outlive requests: a conversation that continues computes only what is new.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch

from ropewalk.adapters.request import AdapterUse, Request, checked_request
from ropewalk.base.errors import RequestError
from ropewalk.engine.cache_pool import CachePool, EngineModel
from ropewalk.engine.dry_breakers import TextBreakers
from ropewalk.engine.text_stream import Completion, TextRequest, TextStream, shown_text
from ropewalk.engine.turn_queue import StepTurns, Ticket, TurnQueue
from ropewalk.generate.evaluate import token_logprobs
from ropewalk.generate.generate import CacheLike, Cancelled, Generation, GenerationStats, Progress, Step, checked_prompt
from ropewalk.generate.routing import AUTO, route
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.chat import ChatTemplate, Message, Template, model_template, named_template
from ropewalk.text.continuation import render_continued
from ropewalk.text.tokenizer.length import encode_fitting
from ropewalk.text.tokenizer.load import Tokenizer, check_tokenizer_fits

WAIT_STEP_S = 0.05  # how often a waiting request checks whether it has been cancelled


class Engine:
    """Generates text. `last_stats` and `last_finish_reason` describe the request that was started last.

    chat_template: a name from `chat_formats`, or a template; default: the one in the model's folder, or, with a
        warning, the format "plain".
    num_caches: how many conversations stay computed, and how many requests run at once; each cache takes the memory
        of a full context once it is full.
    queue_limit: how many further requests may wait (None: any number).

    Raises:
        ConfigError: the tokenizer belongs to another model, or there is not enough memory for the caches.
        UnsupportedError: there is no chat template of that name.
    """

    def __init__(
        self,
        model: EngineModel,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | str | None = None,
        num_caches: int = 1,
        queue_limit: int | None = None,
    ) -> None:
        check_tokenizer_fits(tokenizer, model.config.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.queue = TurnQueue(num_caches, queue_limit)
        self._caches = CachePool(model, num_caches)
        self._step_line = TurnQueue(1)
        if isinstance(chat_template, str):
            chat_template = named_template(chat_template, tokenizer.special_tokens)
        self._chat_template: Template | None = chat_template
        self._template_lock = threading.Lock()
        self._holders: list[int] = []  # threads whose requests run without a ticket from the caller
        self._last: TextRequest | None = None
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.end_token_ids = tuple(dict.fromkeys((*model.config.eos_token_ids, *eos)))

    @property
    def context_size(self) -> int:
        """The most tokens that a prompt and its reply can have together."""
        return self._caches.capacity

    @property
    def chat_template(self) -> Template:
        """The template that conversations are written with. The log warns once of a model without one.

        Raises:
            ConfigError: the model's own template is broken.
        """
        with self._template_lock:
            if self._chat_template is None:
                self._chat_template = model_template(self.tokenizer.source.parent, self.tokenizer.special_tokens)
            return self._chat_template

    def enter(self, on_turn: Callable[[], None] | None = None) -> Ticket:
        """Join the queue before there is a stream, to show the position in it or to give up waiting.

        on_turn: called once, from any thread, when the turn comes. The caller closes the ticket.

        Raises:
            QueueFullError: `queue_limit` requests are already waiting.
        """
        return self.queue.enter(on_turn)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While active, no request runs, so adapters and the layer order can be changed.

        Waits in the queue behind earlier requests. A thread with an open stream must not use this: it would wait for
        itself.
        """
        with self.queue.enter(turns=self.queue.num_turns) as ticket:
            ticket.wait()
            yield

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
        ticket: Ticket | None = None,
    ) -> TextStream:
        """Continue a prompt; iterate over the result for pieces of text, or use its `steps`.

        prompt: text (the bos token is added where the tokenizer's files say so), or token ids, used as they are.
        cancelled: called between the steps of the model; True ends the reply, which keeps the text so far.
        progress: called with (tokens done, tokens to do) while the prompt is read.
        adapters: as for `Model.forward`, such as "storm+poet:0.5@10-11"; "auto" chooses the loaded adapter, or none,
            that finds the prompt least surprising; the stream's `routing` tells which.
        ticket: a place in the queue from `enter`, which the caller closes; it serves one stream after another.
            Default: the stream enters the queue when its first piece is requested, and leaves it at its end.

        Raises:
            RequestError: the prompt is empty, does not fit, or contains unknown ids; adapters that are not loaded.
            QueueFullError: at the first piece, if `queue_limit` requests are already waiting.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        return self._start(ids, params, cancelled, progress, adapters, ticket)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        adapters: Request | None = None,
        ticket: Ticket | None = None,
    ) -> Completion:
        """The whole reply at once; arguments and errors as for `stream`."""
        return self.stream(prompt, params, cancelled, progress, adapters, ticket).complete()

    def score(
        self,
        prompt_ids: Sequence[int],
        count: int = 0,
        cancelled: Cancelled | None = None,
        adapters: Request | None = None,
        ticket: Ticket | None = None,
    ) -> list[Step] | None:
        """The tokens of a prompt, each but the first with its log probability and the `count` most likely tokens there.

        None if cancelled. A reply to the same prompt then finds it in the cache. Other arguments and errors as for
        `stream`.
        """
        ids = checked_prompt(self.model, self.context_size, prompt_ids)
        request = TextRequest(ids, SamplingParams(), cancelled or _never, None, _adapters_or_auto(adapters), ticket)
        with self._turn(request) as has_turn, torch.inference_mode():
            turns = StepTurns(self._step_line)
            asks = _gives_way(request, turns)
            if not has_turn or not self._choose_adapters(request, turns, asks):
                return None
            with self._caches.lend(ids, request.adapters) as cache, turns:
                found = token_logprobs(self.model, cache, ids, count, request.adapters, asks)
        if found is None:
            return None
        return [Step(ids[0])] + [Step(token_id, *values) for token_id, values in zip(ids[1:], found, strict=True)]

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        adapters: Request | None = None,
        ticket: Ticket | None = None,
        **variables: Any,
    ) -> TextStream:
        """The assistant's next turn, as a stream. `variables` are those of `chat_ids`; the rest is as for `stream`.

        Raises:
            RequestError: as for `stream`; messages that the template refuses. ConfigError: a broken template.
        """
        params = params or SamplingParams()
        params = replace(params, stop=tuple(dict.fromkeys(params.stop + self.chat_template.stop)))
        return self._start(self.chat_ids(messages, **variables), params, cancelled, progress, adapters, ticket)

    def chat_ids(
        self, messages: Sequence[Message], *, continue_final_message: bool = False, **variables: Any
    ) -> list[int]:
        """The prompt of a conversation in token ids, up to the beginning of the assistant's turn.

        continue_final_message: end with the last message itself, so that the reply continues it.
        variables: passed to the chat template; add_generation_prompt=False ends before the assistant's turn.

        Raises:
            RequestError: as for `chat`; continue_final_message together with add_generation_prompt.
            ContextLengthError: the conversation has more tokens than the context.
        """
        template = self.chat_template
        if continue_final_message:
            if variables.pop("add_generation_prompt", False):
                raise RequestError("continue_final_message and add_generation_prompt cannot be used together: give one")
            text = render_continued(template, messages, **variables)
        else:
            text = template.render(messages, **variables)
        return self.encode(text, add_bos=False if template.writes_bos else None)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The tokens of a text, as `Tokenizer.encode`; one that cannot fit the context is not tokenised but refused.

        Raises:
            ContextLengthError: it has more tokens than the context. RequestError: as `Tokenizer.encode`.
        """
        return encode_fitting(self.tokenizer, text, self.context_size, add_bos)

    def _start(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None,
        cancelled: Cancelled | None,
        progress: Progress | None,
        adapters: Request | None,
        ticket: Ticket | None,
    ) -> TextStream:
        params = params if params is not None else SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, got {type(params).__name__}")
        ids = checked_prompt(self.model, self.context_size, prompt_ids)
        self._last = TextRequest(ids, params, cancelled or _never, progress, _adapters_or_auto(adapters), ticket)
        return TextStream(self._last, self._pieces(self._last))

    def _pieces(self, request: TextRequest) -> Iterator[str]:
        """The text of a request, piece by piece; holds a turn and a cache until its end."""
        try:
            with self._turn(request) as has_turn:
                steps = StepTurns(self._step_line)
                cancelled = _gives_way(request, steps)
                if not has_turn or not self._choose_adapters(request, steps, cancelled):
                    request.finish_reason = "cancelled"
                    return
                with self._caches.lend(request.prompt_ids, request.adapters) as cache:
                    request.generation = self._generation(request, cache, cancelled)
                    with closing(request.generation):
                        yield from shown_text(self.tokenizer, request, _in_turns(request.generation, steps))
        except GeneratorExit:
            request.finish_reason = "cancelled"
            raise

    def _generation(self, request: TextRequest, cache: CacheLike, cancelled: Cancelled) -> Generation:
        return Generation(
            self.model,
            cache,
            request.prompt_ids,
            request.params,
            self.end_token_ids,
            cancelled,
            request.progress,
            request.adapters,
            TextBreakers(self.tokenizer, request.params.dry_sequence_breakers),
        )

    def _choose_adapters(self, request: TextRequest, steps: StepTurns, cancelled: Cancelled) -> bool:
        """Replace "auto" by the adapters chosen; False if cancelled."""
        if request.adapters != AUTO:
            return True
        with steps:
            request.routing = route(self.model, request.prompt_ids, cancelled)
        if request.routing is not None:
            request.adapters = request.routing.adapters
        return request.routing is not None

    @contextmanager
    def _turn(self, request: TextRequest) -> Iterator[bool]:
        """Wait for the request's turn and hold it; gives False if cancelled while waiting."""
        ticket = request.ticket
        if ticket is not None:
            yield self._await(ticket, request)
            return
        thread = threading.get_ident()
        if self._holders.count(thread) == self.queue.num_turns:
            raise RequestError(
                "this engine is still busy with a stream that this thread began: exhaust it or close() it first"
            )
        with self.queue.enter() as ticket:
            has_turn = self._await(ticket, request)
            self._holders.append(thread)
            try:
                yield has_turn
            finally:
                self._holders.remove(thread)

    def _await(self, ticket: Ticket, request: TextRequest) -> bool:
        """Wait for the turn; False if cancelled while waiting.

        Raises:
            RequestError: the ticket is closed, so its turn will never come.
        """
        started = time.perf_counter()
        while not ticket.wait(WAIT_STEP_S):
            if ticket.closed:
                raise RequestError("this ticket is closed: enter the queue again")
            if request.cancelled():
                return False
        request.queue_s = time.perf_counter() - started
        return True


def _never() -> bool:
    return False


def _adapters_or_auto(adapters: Request | None) -> str | tuple[AdapterUse, ...]:
    return AUTO if isinstance(adapters, str) and adapters == AUTO else checked_request(adapters)


def _gives_way(request: TextRequest, steps: StepTurns) -> Cancelled:
    """A check for cancellation that also lets other requests compute between the slow layers of a prompt."""

    def cancelled() -> bool:
        if not request.steps:
            steps.give_way()
        return request.cancelled()

    return cancelled


def _in_turns(generation: Generation, steps: StepTurns) -> Iterator[Step]:
    """The steps of a reply, each computed when it is this request's turn."""
    while True:
        with steps:
            step = next(generation, None)
        if step is None:
            return
        yield step
