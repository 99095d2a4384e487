"""Text in, text out: a model, its tokenizer, and the requests that share its steps.

    text -> ids -> queue -> sequence -> generate/generate.py -> ids -> pieces of text, without stop strings

So many requests run at once as there are turns; the others wait. What runs shares the steps and the pages of the model
(`generate/scheduler/`), and each request gets the same tokens as if it ran alone. What a request has computed stays as
long as there is memory: a conversation that continues, or begins like another one, computes only what is new.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from typing import Any

import torch

from ropewalk.adapters.request import AdapterUse, Request, checked_request
from ropewalk.base.choices import MAX_RUNNING, RESCALE_MODE
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.engine.dry_breakers import TextBreakers
from ropewalk.engine.kept import KeptPrompts
from ropewalk.engine.kept_folder import KeptFolder
from ropewalk.engine.shorten import num_opening_tokens, shortened
from ropewalk.engine.speculation import Speculation
from ropewalk.engine.text_stream import Completion, TextRequest, TextStream, shown_text
from ropewalk.engine.turn_queue import Ticket, TurnQueue
from ropewalk.engine.turns import Turns
from ropewalk.generate.context_shift import SINKS, ContextShift, checked_shift
from ropewalk.generate.evaluate import token_logprobs
from ropewalk.generate.generate import Cancelled, Generation, GenerationStats, Progress, Step
from ropewalk.generate.guesses import Guesses
from ropewalk.generate.prompt import checked_prompt
from ropewalk.generate.routing import AUTO, route
from ropewalk.generate.sampling import SamplingParams, check_stop_tokens
from ropewalk.generate.scheduler.plan import INTERACTIVE, check_client, check_priority
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.scheduler.sequence import Sequence as OpenSequence
from ropewalk.generate.scheduler.steps import StepModel
from ropewalk.text.chat import ChatTemplate, Message, Template, model_template, named_template
from ropewalk.text.continuation import render_continued
from ropewalk.text.tokenizer.length import encode_fitting
from ropewalk.text.tokenizer.load import Tokenizer, check_tokenizer_fits


class Engine:
    """Generates text. `last_stats` and `last_finish_reason` describe the request that was started last.

    chat_template: a name from `chat_formats`, or a template; default: the one in the model's folder, or, with a
        warning, the format "plain".
    max_running: how many requests run at once. They share the memory that the model was loaded with for its cache; if
        it does not suffice, the most important ones go on first.
    queue_limit: how many further requests may wait (None: any number).
    context_shift: what requests do that do not say it themselves; see `stream`.
    speculation: "ngram" guesses ahead what stood in the text before, "draft" asks `draft_model`, a smaller model of the
        same vocabulary or its folder; the text is the same without. Default: "draft" if there is a draft model.
    kept_folder: where prompts are kept that were read once; those that begin like one of them start from it (`kept`).
    adapters: of requests that name none themselves, as for `stream`; they must be loaded.

    Raises:
        ConfigError: the tokenizer, or the draft model, belongs to another model; another argument is wrong.
        RequestError: an adapter is not loaded. UnsupportedError: there is no chat template of that name.
    """

    def __init__(
        self,
        model: StepModel,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | str | None = None,
        max_running: int = MAX_RUNNING,
        queue_limit: int | None = None,
        draft_model: Any = None,
        speculation: str | None = None,
        context_shift: bool | int = False,
        kept_folder: KeptFolder | None = None,
        adapters: Request | None = None,
    ) -> None:
        check_tokenizer_fits(tokenizer, model.config.vocab_size)
        if not isinstance(max_running, int) or isinstance(max_running, bool) or max_running < 1:
            raise ConfigError(f"max_running must be a positive integer, got {max_running!r}")
        if queue_limit is not None and not _is_count(queue_limit):
            raise ConfigError(f"queue_limit must be an integer from 0 on, or None, got {queue_limit!r}")
        if kept_folder is not None and not isinstance(kept_folder, KeptFolder):
            raise ConfigError(f"kept_folder must be a KeptFolder, got {type(kept_folder).__name__}")
        if not (chat_template is None or isinstance(chat_template, str) or hasattr(chat_template, "render")):
            raise ConfigError(f"chat_template must be a name or a template, got {type(chat_template).__name__}")
        self.model = model
        self.tokenizer = tokenizer
        self.queue = TurnQueue(max_running, queue_limit)
        checked_shift(context_shift)
        self.context_shift = context_shift
        self._adapters = _adapters_or_auto(adapters)
        if self._adapters != AUTO:
            model.adapter_key(self._adapters)
        self._speculation = Speculation(speculation, draft_model, model, tokenizer)
        self.scheduler = Scheduler(model, self._speculation.patience)
        if isinstance(chat_template, str):
            chat_template = named_template(chat_template, tokenizer.special_tokens)
        self._chat_template: Template | None = chat_template
        self._template_lock = threading.Lock()
        self._turns = Turns(self.queue)
        self._last: TextRequest | None = None
        self.kept = KeptPrompts(self, kept_folder)
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.end_token_ids = tuple(dict.fromkeys((*model.config.eos_token_ids, *eos)))

    @property
    def context_size(self) -> int:
        """The most tokens that a prompt and its reply can have together."""
        return self.scheduler.capacity

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

    @property
    def speculation(self) -> str | None:
        """Who guesses ahead: "ngram", "draft" or None."""
        return self._speculation.kind

    def enter(
        self, on_turn: Callable[[], None] | None = None, client: Hashable = None, priority: str = INTERACTIVE
    ) -> Ticket:
        """Join the queue before there is a stream, to show the position in it or to give up waiting.

        on_turn: called once, from any thread, when the turn comes. The caller closes the ticket. client, priority: as
        for `stream`.

        Raises:
            QueueFullError: `queue_limit` requests are already waiting. RequestError: an unknown priority.
        """
        return self.queue.enter(on_turn, client=client, priority=priority)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While active, no request runs, so adapters and the layer order can be changed.

        Waits in the queue behind earlier requests. A thread with an open stream must not use this: it would wait for
        itself.
        """
        with self.queue.enter(turns=self.queue.num_turns) as ticket:
            ticket.wait()
            yield

    def rescale(
        self,
        rope_scaling: Mapping[str, Any] | str | None = None,
        mode: str = RESCALE_MODE.default,
        **rope: Any,
    ) -> None:
        """Another RoPE from the next step on, while replies run and conversations are open.

        mode: "rotate" turns what is cached of them, so that they go on at once; "recompute" lets each be read anew, to
        the bits of a model that was loaded like this. rope: compress_pos_emb, alpha_value, rope_theta and max_seq_len,
        as for `Model.rescale`, which says what they mean and what it raises.

        Raises:
            As `Model.rescale`; RequestError: a running reply is longer than max_seq_len. Nothing is changed.
        """
        self.scheduler.rescale(mode, rope_scaling=rope_scaling, **rope)

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
        client: Hashable = None,
        priority: str = INTERACTIVE,
        context_shift: bool | int | None = None,
    ) -> TextStream:
        """Continue a prompt; iterate over the result for pieces of text, or use its `steps`.

        prompt: text (the bos token is added where the tokenizer's files say so), or token ids, used as they are.
        cancelled: called between the steps of the model; True ends the reply, which keeps the text so far.
        progress: called with (tokens done, tokens to do) while the prompt is read.
        adapters: as for `Model.forward`, such as "storm+poet:0.5@10-11"; "auto" chooses the loaded adapter, or none,
            that finds the prompt least surprising; the stream's `routing` tells which.
        ticket: a place in the queue from `enter`, which the caller closes; it serves one stream after another.
            Default: the stream enters the queue when its first piece is requested, and leaves it at its end.
        client: who asks. Turns, and the reading of prompts, are shared fairly between clients; None: a client of its
            own. priority: "interactive", or "batch", which waits for all interactive requests.
        context_shift: True: a reply that reaches the end of the window goes on, for which the oldest tokens are dropped
            and the rest is moved down without being read again; and a prompt that is an earlier one of this client
            without a stretch in the middle is not read again either. A number: that many tokens stay at the start, at
            most half of the window. False: the reply ends there. None: as the engine was made. `stats.shifted_tokens`
            tells.

        Raises:
            RequestError: the prompt is empty, does not fit, or contains unknown ids; adapters that are not loaded.
            QueueFullError: at the first piece, if `queue_limit` requests are already waiting.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        shift = checked_shift(self.context_shift if context_shift is None else context_shift)
        return self._start(ids, params, cancelled, progress, adapters, ticket, client, priority, shift)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        adapters: Request | None = None,
        ticket: Ticket | None = None,
        client: Hashable = None,
        priority: str = INTERACTIVE,
        context_shift: bool | int | None = None,
    ) -> Completion:
        """The whole reply at once; arguments and errors as for `stream`."""
        given = prompt, params, cancelled, progress, adapters, ticket, client, priority, context_shift
        return self.stream(*given).complete()

    def score(
        self,
        prompt_ids: Sequence[int],
        count: int = 0,
        cancelled: Cancelled | None = None,
        adapters: Request | None = None,
        ticket: Ticket | None = None,
        client: Hashable = None,
        priority: str = INTERACTIVE,
    ) -> list[Step] | None:
        """The tokens of a prompt, each but the first with its log probability and the `count` most likely tokens there.

        None if cancelled. A reply to the same prompt then finds it in the cache. Other arguments and errors as for
        `stream`.
        """
        if not _is_count(count):
            raise RequestError(f"count must be an integer from 0 on, got {count!r:.80}")
        request = self._request(prompt_ids, SamplingParams(), cancelled, None, adapters, ticket, client, priority, None)
        with self._turns.take(request) as has_turn, torch.inference_mode():
            if not has_turn or not self._choose_adapters(request):
                return None
            with self._open(request) as sequence:
                found = token_logprobs(sequence, count, request.cancelled)
        ids = request.prompt_ids
        if found is None:
            return None
        return [Step(ids[0])] + [Step(token_id, *values) for token_id, values in zip(ids[1:], found, strict=True)]

    def read(
        self,
        prompt: str | Sequence[int],
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        adapters: Request | None = None,
        ticket: Ticket | None = None,
        client: Hashable = None,
        priority: str = INTERACTIVE,
    ) -> Any:
        """Read a prompt, write nothing: a cache (`model.KvCache`) that holds it, to be saved; None if cancelled.

        Arguments and errors as for `stream`.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        request = self._request(ids, None, cancelled, progress, adapters, ticket, client, priority, None)
        with self._turns.take(request) as has_turn, torch.inference_mode():
            if not has_turn or not self._choose_adapters(request):
                return None
            self.kept.recall(request.prompt_ids, request.adapters)
            with self._open(request, copies=True) as sequence:
                sequence.forward(request.prompt_ids, "none", request.progress, request.cancelled)
                return sequence.copy

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        adapters: Request | None = None,
        ticket: Ticket | None = None,
        client: Hashable = None,
        priority: str = INTERACTIVE,
        context_shift: bool | int | None = None,
        **variables: Any,
    ) -> TextStream:
        """The assistant's next turn, as a stream. `variables` are those of `chat_ids`; the rest is as for `stream`.

        With `context_shift`, a conversation that leaves no room for a reply loses its oldest turns
        (`shorten.shortened`), and what stays at the start of the window is what stands before the first turn.

        Raises:
            RequestError: as for `stream`; messages that the template refuses. ConfigError: a broken template.
        """
        params = params or SamplingParams()
        params = replace(params, stop=tuple(dict.fromkeys(params.stop + self.chat_template.stop)))
        ids, keep, dropped = self.chat_prompt(messages, params.max_new_tokens, context_shift, **variables)
        shift = checked_shift(keep)
        stream = self._start(ids, params, cancelled, progress, adapters, ticket, client, priority, shift)
        self._last.dropped_messages = dropped
        return stream

    def chat_prompt(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        context_shift: bool | int | None = None,
        **variables: Any,
    ) -> tuple[list[int], bool | int, int]:
        """(the prompt in token ids, `context_shift` for `stream`, how many of the oldest messages were left out).

        With context shift, messages are left out that leave no room for a reply, and what stays at the start of the
        window is what stands before the first turn, unless a number is given.

        Raises:
            RequestError, ContextLengthError: as for `chat_ids`.
        """
        wanted = self.context_shift if context_shift is None else context_shift
        if checked_shift(wanted) is None:
            return self.chat_ids(messages, **variables), False, 0
        kept, dropped = shortened(self, messages, max_new_tokens, **variables)
        keep = max(num_opening_tokens(self, messages, **variables), SINKS) if wanted is True else wanted
        return self.chat_ids(kept, **variables), keep, dropped

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
        text = self.chat_text(messages, continue_final_message=continue_final_message, **variables)
        return self.encode(text, add_bos=False if self.chat_template.writes_bos else None)

    def chat_text(self, messages: Sequence[Message], *, continue_final_message: bool = False, **variables: Any) -> str:
        """As `chat_ids`, before it becomes tokens: a conversation of any length."""
        if not continue_final_message:
            return self.chat_template.render(messages, **variables)
        if variables.pop("add_generation_prompt", False):
            raise RequestError("continue_final_message and add_generation_prompt cannot be used together: give one")
        return render_continued(self.chat_template, messages, **variables)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The tokens of a text, as `Tokenizer.encode`; one that cannot fit the context is not tokenised but refused.

        Raises:
            ContextLengthError: it has more tokens than the context. RequestError: as `Tokenizer.encode`.
        """
        return encode_fitting(self.tokenizer, text, self.context_size, add_bos)

    def _start(self, *given: Any) -> TextStream:
        self._last = self._request(*given)
        return TextStream(self._last, self._pieces(self._last))

    def _request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None,
        cancelled: Cancelled | None,
        progress: Progress | None,
        adapters: Request | None,
        ticket: Ticket | None,
        client: Hashable,
        priority: str,
        shift: ContextShift | None,
    ) -> TextRequest:
        params = params if params is not None else SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, got {type(params).__name__}")
        check_priority(priority)
        check_client(client)
        ids = checked_prompt(self.scheduler.vocab_size, self.context_size, prompt_ids)
        check_stop_tokens(params.stop_token_ids, self.scheduler.vocab_size)
        uses = self._adapters if adapters is None else _adapters_or_auto(adapters)
        return TextRequest(ids, params, cancelled or _never, progress, uses, ticket, client, priority, shift)

    def _pieces(self, request: TextRequest) -> Iterator[str]:
        """The text of a request, piece by piece; holds a turn and pages until its end."""
        try:
            with self._turns.take(request) as has_turn:
                if not has_turn or not self._choose_adapters(request):
                    request.finish_reason = "cancelled"
                    return
                self.kept.recall(request.prompt_ids, request.adapters)
                with self._open(request, request.copies) as sequence, self._guesses(request) as guesses:
                    request.generation = self._generation(request, sequence, guesses)
                    with closing(request.generation):
                        yield from shown_text(self.tokenizer, request, request.generation)
                    request.prompt_cache = sequence.copy
        except GeneratorExit:
            request.finish_reason = "cancelled"
            raise

    def _open(self, request: TextRequest, copies: bool = False) -> AbstractContextManager[OpenSequence]:
        shifts = request.shift is not None
        return self.scheduler.open(
            request.prompt_ids, request.adapters, request.client, request.priority, copies=copies, shifts=shifts
        )

    def _guesses(self, request: TextRequest) -> AbstractContextManager[Guesses | None]:
        return self._speculation.guesses(
            request.prompt_ids, request.params, request.cancelled, request.client, request.priority
        )

    def _generation(self, request: TextRequest, sequence: OpenSequence, guesses: Guesses | None) -> Generation:
        return Generation(
            sequence,
            request.params,
            self.end_token_ids,
            request.cancelled,
            request.progress,
            TextBreakers(self.tokenizer, request.params.dry_sequence_breakers),
            guesses,
            request.shift,
        )

    def _choose_adapters(self, request: TextRequest) -> bool:
        """Replace "auto" by the adapters chosen; False if cancelled."""
        if request.adapters != AUTO:
            return True
        request.routing = route(self.scheduler, request.prompt_ids, request.cancelled, request.client, request.priority)
        if request.routing is not None:
            request.adapters = request.routing.adapters
        return request.routing is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _never() -> bool:
    return False


def _adapters_or_auto(adapters: Request | None) -> str | tuple[AdapterUse, ...]:
    return AUTO if isinstance(adapters, str) and adapters == AUTO else checked_request(adapters)
