"""One request to the engine in a thread of its own, followed through snapshots.

A page is served by whatever worker thread is free, and must show something while a request waits or a prompt is read.
So the engine runs here, and the follower looks a few times a second, however fast or slow the model is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ropewalk.base.errors import RopewalkError
from ropewalk.engine.engine import Engine
from ropewalk.engine.text_stream import TextStream
from ropewalk.engine.turn_queue import Ticket
from ropewalk.generate.generate import Cancelled, GenerationStats, Progress, Step
from ropewalk.generate.sampling import SamplingParams

LOOK_S = 0.08  # a dozen looks a second read as flowing text and cost a browser little
WAITING, READING, WRITING, DONE = "waiting", "reading", "writing", "done"

StartStream = Callable[[Cancelled, Progress, Ticket], TextStream]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A reply at one moment. place: in the queue, 1 is next, 0 has its turn; read: (tokens of the prompt done, all);
    tokens: of the reply, each with the text that it added; error: why there is no reply, for people."""

    phase: str
    text: str = ""
    place: int = 0
    read: tuple[int, int] = (0, 0)
    stats: GenerationStats | None = None
    finish_reason: str | None = None
    tokens: tuple[tuple[Step, str], ...] = ()
    error: str | None = None


class Reply:
    """Made with what starts the stream, given `cancelled`, `progress` and a place in the queue of the engine; runs
    while it is followed."""

    def __init__(self, engine: Engine, start: StartStream) -> None:
        self._engine = engine
        self._start = start
        self._place = 0
        self._cancelled = threading.Event()
        self._changed = threading.Event()
        self._pieces: list[str] = []
        self._tokens: list[tuple[Step, str]] = []
        self._read = (0, 0)
        self._stream: TextStream | None = None
        self._error: str | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="reply", daemon=True)

    def cancel(self) -> None:
        """End it soon, with what there is."""
        self._cancelled.set()

    def follow(self) -> Iterator[Snapshot]:
        """Snapshots until the end; the last one is of the phase DONE. Leaving the iteration early cancels the reply.

        Raises:
            Exception: whatever went wrong in the engine apart from errors that are explained.
        """
        self._thread.start()
        try:
            while self._thread.is_alive():
                self._changed.wait(LOOK_S)
                self._changed.clear()
                yield self._snapshot()
                self._thread.join(LOOK_S)
            if self._failure is not None:
                raise self._failure
            yield self._snapshot()
        finally:
            self.cancel()

    def _run(self) -> None:
        try:
            with self._engine.enter() as ticket:
                while not ticket.wait(LOOK_S) and not self._cancelled.is_set():
                    self._place = ticket.position
                self._place = 0
                self._stream = self._start(self._cancelled.is_set, self._progress, ticket)
                for piece in self._stream:
                    self._tokens += self._stream.tokens(len(self._tokens))
                    self._pieces.append(piece)
                    self._changed.set()
        except RopewalkError as error:
            self._error = str(error)
        except Exception as error:  # handed to the follower, who is asked for it
            self._failure = error
        finally:
            self._changed.set()

    def _progress(self, done: int, total: int) -> None:
        self._read = (done, total)

    def _snapshot(self) -> Snapshot:
        stream = self._stream
        if not self._thread.is_alive():
            phase = DONE
        elif self._pieces:
            phase = WRITING
        else:
            phase = WAITING if stream is None or stream.stats is None else READING
        return Snapshot(
            phase,
            "".join(self._pieces),
            self._place,
            self._read,
            None if stream is None else stream.stats,
            None if stream is None else stream.finish_reason,
            tuple(self._tokens),
            self._error,
        )


def start_reply(
    engine: Engine, prompt_ids: Sequence[int], params: SamplingParams, adapters: Sequence[tuple[str, float]] = ()
) -> Reply:
    """The continuation of a prompt, not begun yet."""
    wanted = list(adapters) or None

    def start(cancelled: Cancelled, progress: Progress, ticket: Ticket) -> TextStream:
        return engine.stream(prompt_ids, params, cancelled, progress, wanted, ticket)

    return Reply(engine, start)
