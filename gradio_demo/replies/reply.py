"""One request to the engine in a thread of its own, followed through snapshots.

A page is served by whatever worker thread is free, and must show something while a request waits or a prompt is read.
So the engine runs as `Work`, and the follower looks a few times a second, however fast or slow the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ropewalk.engine.engine import Engine
from ropewalk.engine.text_stream import TextStream
from ropewalk.engine.turn_queue import Ticket
from ropewalk.engine.work import Work
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
    """A reply that runs while it is followed. start: makes the stream, given `cancelled`, `progress` and a place in the
    engine's queue. person: who asks."""

    def __init__(self, engine: Engine, start: StartStream, person: str | None = None) -> None:
        self._engine = engine
        self._person = person
        self._start = start
        self._place = 0
        self._pieces: list[str] = []
        self._tokens: list[tuple[Step, str]] = []
        self._stream: TextStream | None = None
        self._work = Work(self._run, "reply")

    def cancel(self) -> None:
        """End it soon, with what there is."""
        self._work.cancel()

    def follow(self) -> Iterator[Snapshot]:
        """Snapshots until the end; the last one is of the phase DONE. Leaving the iteration early cancels the reply.

        Raises:
            Exception: an unexpected error in the engine; those that ropewalk explains are in the last snapshot.
        """
        yield from self._work.follow(self._snapshot, LOOK_S)

    def _run(self, work: Work[None]) -> None:
        with self._engine.enter(client=self._person) as ticket:
            while not ticket.wait(LOOK_S) and not work.is_cancelled():
                self._place = ticket.position
            self._place = 0
            self._stream = self._start(work.is_cancelled, work.progress, ticket)
            for piece in self._stream:
                self._tokens += self._stream.tokens(len(self._tokens))
                self._pieces.append(piece)
                work.changed()

    def _snapshot(self, is_over: bool) -> Snapshot:
        stream, error = self._stream, self._work.error
        if is_over:
            phase = DONE
        elif self._pieces:
            phase = WRITING
        else:
            phase = WAITING if stream is None or stream.stats is None else READING
        return Snapshot(
            phase,
            "".join(self._pieces),
            self._place,
            self._work.done_of,
            None if stream is None else stream.stats,
            None if stream is None else stream.finish_reason,
            tuple(self._tokens),
            None if error is None else str(error),
        )


def start_reply(
    engine: Engine,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    adapters: Sequence[tuple[str, float]] = (),
    person: str | None = None,
    context_shift: bool | int = False,
) -> Reply:
    """The continuation of a prompt, not begun yet. person: who asks; people take turns. context_shift: as for
    `Engine.stream`."""
    wanted = list(adapters) or None

    def start(cancelled: Cancelled, progress: Progress, ticket: Ticket) -> TextStream:
        return engine.stream(
            prompt_ids, params, cancelled, progress, wanted, ticket, person, context_shift=context_shift
        )

    return Reply(engine, start, person)
