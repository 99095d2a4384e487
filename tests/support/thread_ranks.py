"""Ranks of a pipeline as threads of the test's process: all that ranks do, but for starting Python for each of them."""

from __future__ import annotations

import subprocess
import threading
from typing import Any

import pytest

from ropewalk.model.pipeline import start
from ropewalk.model.pipeline.machine import Seat
from ropewalk.model.pipeline.meeting import Meeting
from ropewalk.model.pipeline.process import serve_layers


class ThreadRank:
    """Looks like the `Popen` of a rank."""

    stdin = None

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.returncode: int | None = None
        self._thread = threading.Thread(target=self._run, args=(Seat(rank, size, rank, size), port), daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return self.returncode

    def kill(self) -> None:
        raise AssertionError("a rank did not end by itself")

    def _run(self, seat: Seat, port: int) -> None:
        self.returncode = serve_layers(Meeting.visited(seat, port))


def start_ranks_as_threads(patched: pytest.MonkeyPatch) -> None:
    """From now on, for `load_model(..., pipeline=N)`."""
    patched.setattr(start, "_start_child", lambda *seat: ThreadRank(*seat))


def child_processes(pipeline: Any) -> list[subprocess.Popen]:
    """The processes that a model's pipeline has started, those of ranks 1 and on."""
    found = [cell.cell_contents for cell in pipeline._chain._on_end.__closure__]
    return next(each for each in found if isinstance(each, list))
