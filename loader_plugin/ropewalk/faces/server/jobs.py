"""A request's way through the engine, seen from the event loop.

    enter the queue -> (its turn) -> a worker thread writes the replies, one after another -> events -> the loop

The worker thread runs them as one piece of work (`engine/work.py`), which can be cancelled. A waiting job takes no
thread. `Job.close` frees its place at once: in the queue, within a prompt, between tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from ropewalk.base.patience import within
from ropewalk.engine.engine import Engine
from ropewalk.engine.kept import Kept
from ropewalk.engine.text_stream import TextStream
from ropewalk.engine.work import Work as Running
from ropewalk.faces.server.requests import Choice, Work
from ropewalk.generate.generate import GenerationStats, Step
from ropewalk.text.tokenizer.load import StreamDecoder


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of the reply to choice `index`, with the tokens since the last piece, each with its text."""

    index: int
    text: str
    tokens: list[tuple[Step, str]]


@dataclass(frozen=True, slots=True)
class Finished:
    """The reply to choice `index` is complete. tokens: those since the last piece; num_tokens: those of the reply.

    cached_tokens: of the prompt, those that did not have to be read for this reply, nor before it to score them.
    routing: which adapter was chosen and why, if the model's name left that open. kept: the file of the prompt, if the
    request asked to keep it.
    """

    index: int
    reason: str
    tokens: list[tuple[Step, str]]
    num_tokens: int
    stats: GenerationStats
    cached_tokens: int
    routing: str | None
    kept: Kept | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing new for a while. position: that in the queue; 0 while the prompt is read."""

    position: int


Event = Piece | Finished | Waiting


class Jobs:
    """Starts jobs on an engine, and knows those that are not over. Use it in the event loop's thread only."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.live: set[Job] = set()
        self._threads = ThreadPoolExecutor(engine.queue.num_turns, "ropewalk-reply")

    def start(self, work: Work, client: Hashable = None) -> Job:
        """Put the work into the queue. client: who asks.

        Raises:
            QueueFullError: too many are waiting.
        """
        return Job(self, self._threads, work, client)

    def refuse_waiting(self, error: Exception) -> None:
        """End the jobs that have no turn yet with this error."""
        for job in list(self.live):
            if not job.ticket.has_turn:
                job.fail(error)

    async def shut_down(self, error: Exception) -> None:
        """End what still runs with this error, and wait for the threads."""
        for job in list(self.live):
            job.fail(error)
        await asyncio.to_thread(self._threads.shutdown)


class Job:
    """One request. Iterate over `events`; used in a `with` block, it is closed at the end."""

    def __init__(self, jobs: Jobs, threads: ThreadPoolExecutor, work: Work, client: Hashable) -> None:
        self._jobs, self._threads, self._work, self._client = jobs, threads, work, client
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | Finished | Exception | None] = asyncio.Queue()
        self._running = Running(self._run, on_change=self._on_change)
        self._started = False
        self._entered_s = self._loop.time()
        self.queue_s: float | None = None
        self.ticket = jobs.engine.enter(self._on_turn, client, work.priority)
        jobs.live.add(self)

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop, if it is not over. The ticket of a running job is closed by its thread, which still uses its pages."""
        self._running.cancel()
        if not self._started:
            self.ticket.close()
        self._jobs.live.discard(self)

    def fail(self, error: Exception) -> None:
        """End it with an error for the client."""
        self._events.put_nowait(error)
        self.close()

    async def events(self, patience_s: float) -> AsyncIterator[Event]:
        """What happens, until all replies are complete; `Waiting` whenever nothing does for `patience_s`.

        Raises:
            Exception: what went wrong in the engine.
        """
        while True:
            try:
                event = await within(patience_s, self._events.get())
            except asyncio.TimeoutError:
                yield Waiting(self.ticket.position)
                continue
            if event is None:
                return
            if isinstance(event, Exception):
                raise event
            yield event

    def _on_turn(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is listening any more
            self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        if self._running.is_cancelled():
            return
        self._started = True
        self.queue_s = self._loop.time() - self._entered_s
        self._threads.submit(self._running.run)

    def _run(self, running: Running[None]) -> None:
        """In a thread: all replies."""
        try:
            for index, choice in enumerate(self._work.choices):
                if not running.is_cancelled():
                    self._reply(index, choice)
        finally:
            self.ticket.close()

    def _on_change(self) -> None:
        """Post the end, or what went wrong: the client must hear of either."""
        if self._running.is_over:
            self._post(self._running.error or self._running.failure)

    def _reply(self, index: int, choice: Choice) -> None:
        engine, adapters = self._jobs.engine, self._work.adapters
        stream = engine.stream(
            choice.prompt_ids,
            choice.params,
            self._running.is_cancelled,
            adapters=adapters,
            ticket=self.ticket,
            client=self._client,
            priority=self._work.priority,
            context_shift=choice.context_shift,
        )
        tokens = _ShownTokens(stream)
        keeps = self._work.keep is not None and index == 0  # all choices have one prompt
        if keeps:
            stream.keep_prompt()
        is_scored = bool(choice.echo) and choice.params.logprobs is not None
        if choice.echo:
            self._echo(index, choice, self._scored(choice) if is_scored else [])
        for text in stream:
            self._post(Piece(index, text, tokens.shown_with(text)))
        if stream.stats is None or stream.finish_reason == "cancelled":
            return
        routing = None if stream.routing is None else stream.routing.describe()
        cached = 0 if is_scored or stream.routing is not None else stream.stats.reused_tokens
        rest = tokens.rest() if stream.stop_string is None else []
        kept = engine.kept.write_as(self._work.keep, stream.prompt_cache) if keeps else None
        self._post(Finished(index, stream.finish_reason, rest, tokens.num_told, stream.stats, cached, routing, kept))

    def _echo(self, index: int, choice: Choice, steps: Sequence[Step]) -> None:
        """The prompt as the first piece; with its tokens where these have been scored."""
        decoder, start = StreamDecoder(self._jobs.engine.tokenizer), 0
        tokens = []
        for step in steps:
            text = decoder.push(step.token_id) or self._spelling(step.token_id, choice.echo, start)
            tokens.append((step, text))
            start += len(text)
        self._post(Piece(index, choice.echo, tokens))

    def _scored(self, choice: Choice) -> list[Step]:
        """The tokens of the prompt with their log probabilities; none if the job is cancelled."""
        steps = self._jobs.engine.score(
            choice.prompt_ids,
            choice.params.logprobs,
            self._running.is_cancelled,
            self._work.adapters,
            self.ticket,
            self._client,
            self._work.priority,
        )
        return steps or []

    def _spelling(self, token_id: int, echo: str, start: int) -> str:
        """A special token as the prompt spells it there, if it does: decoders leave them out."""
        text = self._jobs.engine.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return text if echo.startswith(text, start) else ""

    def _post(self, event: Piece | Finished | Exception | None) -> None:
        with suppress(RuntimeError):  # as above
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class _ShownTokens:
    """Keeps tokens in step with the text shown: a token belongs to that text if it begins before its end."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._shown = self._start = 0  # characters shown; where the next token's text starts
        self.num_told = 0

    def shown_with(self, text: str) -> list[tuple[Step, str]]:
        """The tokens of the next piece. Those of a stop string, which is not shown, never come."""
        self._shown += len(text)
        told = []
        for token in self._stream.tokens(self.num_told):
            if self._start >= self._shown:
                break
            told.append(token)
            self._start += len(token[1])
        self.num_told += len(told)
        return told

    def rest(self) -> list[tuple[Step, str]]:
        """All remaining tokens, which have no text."""
        told = self._stream.tokens(self.num_told)
        self.num_told += len(told)
        return told
