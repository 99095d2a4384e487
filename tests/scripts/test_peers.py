"""scripts/bench/peers.py: the table of a peer is read, and the script runs on a tiny model beside a stand-in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
TABLE = """main: n_kv_max = 1024, n_batch = 2048, flash_attn = 1
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|    16 |      3 |    1 |     19 |    0.100 |   160.00 |    0.100 |    30.00 |    0.200 |    95.00 |
|    32 |      3 |    1 |     35 |    0.100 |   320.50 |    0.120 |    25.00 |    0.220 |   159.09 |
llama_perf_context_print: done
"""


def test_the_table_of_a_peer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from peers import read_table

    assert read_table(TABLE) == {16: (160.0, 30.0), 32: (320.5, 25.0)}
    assert read_table("error: no model\n") == {}


def stand_in(folder: Path, script: str) -> Path:
    """A program in place of the peer's: a shell script, which has the table in a file beside it."""
    (folder / "table.txt").write_text(TABLE)
    peer = folder / "llama-batched-bench"
    peer.write_text(f"#!/bin/sh\n{script}\n")
    peer.chmod(0o755)
    return peer


def bench_beside(peer: Path) -> subprocess.CompletedProcess[str]:
    """The script, run beside the stand-in where that lies."""
    command = [sys.executable, str(BENCH / "peers.py"), "--smoke", "--llama", str(peer), "--gguf", str(peer)]
    return subprocess.run(command, capture_output=True, text=True, cwd=peer.parent)


def test_the_script_reports_beside_a_peer(tmp_path: Path) -> None:
    done = bench_beside(stand_in(tmp_path, f"cat {tmp_path / 'table.txt'}"))
    assert done.returncode == 0, done.stderr
    assert "times llama.cpp" in done.stdout and "160.000" in done.stdout and "ropewalk" in done.stdout
    done = bench_beside(stand_in(tmp_path, "echo no such model >&2\nexit 1"))
    assert done.returncode == 1 and "llama.cpp measured [] and ended with 1" in done.stderr and "no such" in done.stderr


def test_a_peer_may_log_its_table_and_leaves_no_log_behind(tmp_path: Path) -> None:
    done = bench_beside(stand_in(tmp_path, f"touch llama.log\ncat {tmp_path / 'table.txt'} >&2"))
    assert done.returncode == 0, done.stderr
    assert "320.500" in done.stdout
    assert not (tmp_path / "llama.log").exists()
