"""A chat template in a process of its own, with limits on its time, its memory and what it writes.

Templates come with the model and are untrusted programs. jinja2's sandbox denies them the machine, but not its
time and memory: `9**9**9` or `'x' * 10**9` is one step of the interpreter, which no check between steps and no signal
can interrupt, and the ways to such a step (operators, filters, string methods, macros, constants folded at compile
time) are too many to guard one by one. A process can be killed from any thread, and the system limits its memory. It
starts with the first conversation (about 50 ms), then stays: a rendering takes a millisecond, most of it spent in the
template itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ropewalk.text import template_worker

# The worker is isolated from the environment and from how packages are installed: the paths are all it is given.
_START = (
    "import sys; script, paths = sys.argv[1], sys.argv[5:]; del sys.argv[5:], sys.argv[1]; sys.path[:] = paths; "
    "import runpy; runpy.run_path(script, run_name='__main__')"
)
START_S = 60.0  # importing jinja2, on a machine that is busy with other things


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """The limits of one rendering. max_output: in characters, several times the longest context that there is."""

    max_seconds: float = 2.0
    max_output: int = 4_000_000
    max_memory: int = 512 * 2**20


class TemplateFailure(Exception):
    """A template failed or exceeded a limit; the message says which."""


class TemplateRefusal(Exception):
    """A template refused its messages with `raise_exception`; the message is its reason."""


class TemplateProcess:
    """Runs one template, one rendering at a time; calls from several threads wait for each other."""

    def __init__(self, text: str, limits: TemplateLimits) -> None:
        self._text = text
        self._limits = limits
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(self, values: Mapping[str, Any]) -> str:
        """The text that the template makes of the values.

        Raises:
            TemplateRefusal: it refuses them. TemplateFailure: it fails or exceeds a limit. TypeError, ValueError:
            values that are not plain data.
        """
        request = json.dumps({"values": values}).encode("ascii") + b"\n"
        with self._lock:
            if self._worker is None or not self._worker.is_usable:
                self._worker = _Worker(self._limits)
                request = json.dumps({"text": self._text}).encode("ascii") + b"\n" + request
            answer = self._worker.ask(request)
        if "refused" in answer:
            raise TemplateRefusal(answer["refused"])
        if "rendered" not in answer:
            raise TemplateFailure(answer["failed"] if "failed" in answer else self._limit(answer["over"]))
        return answer["rendered"]

    def _limit(self, what: str) -> str:
        if what == template_worker.MEMORY:
            return f"it needs more than {self._limits.max_memory >> 20} MiB of memory"
        return f"it writes more than {self._limits.max_output:,} characters"


class _Worker:
    """A running `template_worker.py`. It is killed when an answer is late, and when its owner ends."""

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._owner = os.getpid()
        self._has_failed = False
        arguments = [template_worker.__file__, *map(str, (limits.max_output, limits.max_memory, limits.max_seconds))]
        arguments += filter(None, sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the program that shows the reply
            )
        except OSError as error:
            raise TemplateFailure(f"its process cannot be started: {error}") from error
        self._end = weakref.finalize(self, _end_process, self._process, self._owner)
        if self._answer(b"", START_S, "its process did not start") != {"ready": True}:
            raise TemplateFailure("its process did not start")

    @property
    def is_usable(self) -> bool:
        """Whether it can be asked: not after a failure, and not in a process that was forked from its owner."""
        return not self._has_failed and self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: bytes) -> dict[str, Any]:
        """The answer to one line.

        Raises:
            TemplateFailure: none came in time, or the process ended.
        """
        answer = self._answer(request, self._limits.max_seconds, f"it ran longer than {self._limits.max_seconds:g} s")
        if "over" in answer:
            self._give_up()
        return answer

    def _answer(self, request: bytes, seconds: float, too_late: str) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # pipes were asked for
        late = threading.Event()
        timer = threading.Timer(seconds, _end_late, (self._process, late))
        timer.daemon = True
        timer.start()
        line = b""
        try:
            stdin.write(request)
            stdin.flush()
            line = stdout.readline(4 * self._limits.max_output + 2**16)
        except OSError:
            pass  # it has ended; the reason is reported below
        except BaseException:
            self._give_up()
            raise
        finally:
            timer.cancel()
            timer.join()
        if late.is_set():
            self._give_up()
            raise TemplateFailure(too_late)
        if not line.endswith(b"\n"):
            self._give_up()
            raise TemplateFailure(f"its process ended by itself (status {self._process.returncode})")
        return json.loads(line.decode("utf-8", "surrogatepass"))

    def _give_up(self) -> None:
        self._has_failed = True
        self._end()


def _end_late(process: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    process.kill()


def _end_process(process: subprocess.Popen[bytes], owner: int) -> None:
    """Runs also when the interpreter exits; a fork of the owner leaves the process alone."""
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    process.wait()
