"""faces/cli/streams: standard streams that are closed, full, piped or left in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "ropewalk"]
FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="streams are closed and filled as on POSIX systems")


def shell(line: str) -> subprocess.CompletedProcess:
    """A line of a shell, where ROPEWALK is the command."""
    line = line.replace("ROPEWALK", f'"{sys.executable}" -m ropewalk')
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_one_that_leads_nowhere(closed: str) -> None:
    done = shell(f"ROPEWALK generate --max-new-tokens 2 --threads 1 {closed}")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("command", ["info", "generate --max-new-tokens 2 --threads 1", "list --json ."])
def test_a_full_disk_is_told_in_one_line(command: str) -> None:
    done = shell(f"ROPEWALK {command} > /dev/full")
    assert done.returncode == 2
    assert done.stderr.endswith("ropewalk: error: standard output cannot be written: No space left on device\n")
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_the_work_goes_on_when_lines_for_people_have_nowhere_to_go() -> None:
    done = shell("ROPEWALK generate --max-new-tokens 2 --threads 1 2> /dev/full")
    assert done.returncode == 0 and done.stdout


def test_a_text_that_is_piped_to_the_embedded_model_is_its_prompt(tmp_path: Path) -> None:
    options = "generate --max-new-tokens 2 --threads 1 --echo"
    assert shell(f"echo Hemp grows | ROPEWALK {options}").stdout.startswith("Hemp grows\n")
    (tmp_path / "prompt").write_text("Hemp grows")
    assert shell(f"ROPEWALK {options} < '{tmp_path}/prompt'").stdout.startswith("Hemp grows")
    assert "<|user|>" in shell(f"ROPEWALK {options} < /dev/null").stdout  # the example


START = "import ropewalk.__main__ as m, sys; print(flush=True); sys.exit(m.main())"


@pytest.mark.parametrize("delay", [0.02, 0.06, 0.1, 0.15, 0.25, 0.45])
def test_control_c_at_the_start_ends_with_130_and_no_traceback(delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", START, "list"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_CACHE": "/nonexistent"},
    )  # fmt: skip
    process.stdout.readline()  # the command is about to start
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode in (0, 130, -signal.SIGINT) and "Traceback" not in error  # the last: as it was leaving


def test_control_c_at_the_prompt_keeps_the_conversation_and_a_second_one_leaves() -> None:
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "chat", "--max-new-tokens", "2", "--threads", "1"],
        stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        seen = _read_until(ours, "> ")
        assert "/reset forgets" in seen
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C again, /exit or Ctrl-D leaves" in _read_until(ours, "leaves")
        os.write(ours, b"/undo\n")
        _read_until(ours, "nothing to undo")
        for _ in range(2):
            _read_until(ours, "> ")
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stdout.read() == b""  # the prompt is for people, and a reply may go into a file
    finally:
        process.kill()
        os.close(ours)


def _read_until(terminal: int, text: str) -> str:
    """What the terminal shows up to a text."""
    seen, deadline = "", time.monotonic() + 60
    while text not in seen:
        assert time.monotonic() < deadline, seen
        seen += os.read(terminal, 1).decode(errors="replace")
    return seen
