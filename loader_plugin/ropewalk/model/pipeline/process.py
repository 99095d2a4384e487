"""The program of a rank after rank 0: `python -m ropewalk.model.pipeline.process`, and what torchrun's ranks do.

It ends when rank 0 says so, when the pipeline fails, and when the process that started it has gone, whatever the
reason: that one holds the other end of its standard input.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence

from ropewalk.backends.pipeline.loaded import LoadedLayers
from ropewalk.backends.pipeline.messages import Load
from ropewalk.backends.pipeline.rank import Rank
from ropewalk.backends.pipeline.watch import BEAT_S, Watch
from ropewalk.backends.pipeline.wire import LostError
from ropewalk.base.errors import RankError, RopewalkError, brief
from ropewalk.model.pipeline.load import load_share
from ropewalk.model.pipeline.machine import Seat
from ropewalk.model.pipeline.meeting import Meeting

logger = logging.getLogger(__name__)

FAILED = 1
TELLING_S = 3 * BEAT_S  # that a rank which reports a failure stays, since torchrun ends all others when one has gone


def main(arguments: Sequence[str] | None = None) -> int:
    """A rank on the machine of rank 0, which has started it."""
    logging.basicConfig(format="ropewalk: %(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.addLevelName(logging.ERROR, "error")
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name in ("rank", "size", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args(arguments)
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    return serve_layers(Meeting.visited(Seat(args.rank, args.size, args.rank, args.size), args.port))


def serve_layers(meeting: Meeting) -> int:
    """Run layers for rank 0 until it has no more need of them; returns the exit code.

    A failure of the pipeline ends this process at once, wherever it is: its error is logged.
    """
    rank = meeting.seat.rank
    names = [f"rank {number} of {meeting.seat.size}" for number in range(meeting.seat.size)]
    try:
        wire = meeting.wait_to_begin()
    except (RankError, RuntimeError) as error:
        logger.error("rank %d: rank 0 has gone before it loaded a model (%s)", rank, brief(error))
        return FAILED
    if wire is None:
        return 0

    def load(message: Load) -> LoadedLayers:
        names[:] = message.names
        return load_share(message, meeting.seat)

    watch = Watch(meeting.beats, rank, [0], lambda number: names[number], _end_at_once)
    try:
        Rank(wire, load).run()
        watch.end()
        meeting.wait_to_finish()
    except LostError as error:
        watch.fail_(error.rank, str(error))
    except RopewalkError as error:
        watch.fail_(rank, brief(error))
    except Exception as error:
        logger.exception("%s has failed", names[rank])
        watch.fail_(rank, f"{type(error).__name__}: {brief(error)}")
    return 0


def _end_at_once(error: RankError) -> None:
    """Other threads may be inside of the core, or wait for a rank that will not answer."""
    logger.error("%s", error)
    time.sleep(TELLING_S)
    os._exit(FAILED)


def _end_with_the_starter() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(FAILED)


if __name__ == "__main__":
    sys.exit(main())
