"""`ropewalk serve --pipeline`: several clients at once, and the end of the server when a rank is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from fixtures import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts" / "press"))
from server_process import ServerProcess  # noqa: E402


def ranks_of(process: int) -> list[int]:
    """The processes that a server has started."""
    found = " ".join(path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children"))
    return [int(child) for child in found.split()]


def test_clients_are_served_until_a_rank_is_lost_and_then_told() -> None:
    with ServerProcess(["--pipeline", "2", "--max-seq-len", "512"]) as server:

        def answer(number: int) -> str:
            asked = {"prompt": f"def f{number}(", "max_tokens": 12, "temperature": 0}
            return httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"]

        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(answer, range(4)))
        assert together == [answer(number) for number in range(4)]
        (rank,) = ranks_of(server.pid)
        os.kill(rank, signal.SIGKILL)
        started = time.monotonic()
        while server.returncode is None:
            assert time.monotonic() - started < 10
            time.sleep(0.05)
        assert server.returncode == 2
    assert any("a rank of its pipeline was lost" in line for line in server.log), server.log
