"""model/pipeline/: ranks as processes of their own, on the embedded model: their bits, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ropewalk.base.errors import ConfigError, RankError
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from thread_ranks import child_processes

IDS = [(37 * i + 11) % 200 for i in range(90)]
PATIENCE_S = 10.0  # within which every rank is to know
ANSWER = ["generate", "--prompt", "def", "--max-new-tokens", "8", "--temperature", "0", "--max-seq-len", "256"]


@pytest.fixture
def pipeline() -> Iterator[Model]:
    model = load_model(demo_model_path(), 256, pipeline=3)
    yield model
    model.close()
    assert all(child.poll() is not None for child in child_processes(model.backend))


def test_processes_change_no_bit_and_end_with_the_model(pipeline: Model) -> None:
    plain = load_model(demo_model_path(), 256)
    results = []
    for model in (pipeline, plain):
        cache = model.new_cache()
        results.append(torch.cat([model.forward(part, cache, "all") for part in (IDS[:80], IDS[80:], [7])]))
    assert torch.equal(*results)
    assert pipeline.weights.fingerprint == plain.weights.fingerprint
    children = child_processes(pipeline.backend)
    assert [child.poll() for child in children] == [None, None]
    pipeline.close()
    assert [child.poll() for child in children] == [0, 0]


def lose(model: Model, kind: signal.Signals, rank: int, do: Callable[[], object]) -> str:
    """What `do`, repeated, fails with once a rank is lost, within time; all ranks have ended by then or soon."""
    children = child_processes(model.backend)
    threading.Timer(0.2, lambda: children[rank - 1].send_signal(kind)).start()
    started = time.monotonic()
    with pytest.raises(RankError) as told:
        while time.monotonic() - started < 60:
            do()
    assert time.monotonic() - started < PATIENCE_S
    for child in children:
        child.wait(PATIENCE_S)
    return str(told.value)


def test_a_rank_that_is_killed_is_an_error_on_all(capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = load_model(demo_model_path(), 256, pipeline=3)  # here, so that its ranks write to what is captured
    cache = pipeline.new_cache()
    text = lose(pipeline, signal.SIGKILL, 1, lambda: pipeline.forward([3], cache) if cache.length < 250 else None)
    assert "the pipeline has failed: rank 1 of 3 (layer instances" in text
    assert "it has ended, or its connection is lost" in text
    with pytest.raises(RankError, match="rank 1 of 3"):
        pipeline.forward([3], pipeline.new_cache())
    assert "rank 1 of 3 (layer instances" in capfd.readouterr().err  # what rank 2 says


def test_a_rank_that_hangs_is_an_error_on_all(pipeline: Model) -> None:
    failed = threading.Event()
    pipeline.backend.when_failed(failed.set)
    text = lose(pipeline, signal.SIGSTOP, 2, lambda: pipeline.forward(IDS, pipeline.new_cache()))
    assert "rank 2 of 3 (layer instances" in text and "it has not answered for 6 s" in text
    assert failed.is_set()


def test_ranks_end_with_the_process_that_started_them() -> None:
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from ropewalk import load_model\n"
        "from ropewalk.files.embedded import demo_model_path\n"
        "from thread_ranks import child_processes\n"
        "model = load_model(demo_model_path(), 256, pipeline=2)\n"
        "print(child_processes(model.backend)[0].pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    support = Path(__file__).parents[1] / "support"
    done = subprocess.run([sys.executable, "-c", program, support], capture_output=True, text=True, timeout=120)
    until = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_torchrun_starts_the_same() -> None:
    one = [sys.executable, "-m", "ropewalk", *ANSWER]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ropewalk", *ANSWER]
    texts = [subprocess.run(line, capture_output=True, text=True, timeout=120) for line in (one, launcher)]
    assert [done.returncode for done in texts] == [0, 0], texts[1].stderr
    assert texts[0].stdout and texts[0].stdout == texts[1].stdout


def test_replicas_are_refused_where_torchrun_has_started_ranks() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ropewalk"]
    done = subprocess.run([*launcher, "serve", "--replicas", "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode and "ropewalk: error: torchrun has started the ranks of one pipeline" in done.stderr


def test_the_command_line_starts_ranks_and_refuses_what_cannot_be() -> None:
    line = [sys.executable, "-m", "ropewalk", *ANSWER, "--pipeline"]
    done = subprocess.run([*line, "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout
    done = subprocess.run([*line, "99"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "each process needs one: give at most 5" in done.stderr


def test_a_pipeline_is_refused_where_torchrun_has_started_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="is 2 ranks with rank 0 here, and torchrun has started 3 and this is rank 0"):
        load_model(demo_model_path(), 256, pipeline=2)
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(ConfigError, match="start the processes with torchrun, or unset RANK"):
        load_model(demo_model_path(), 256, pipeline=3)
    monkeypatch.setenv("WORLD_SIZE", "")
    os.environ.pop("LOCAL_RANK")
    with pytest.raises(ConfigError, match="here WORLD_SIZE is '', no number: start the processes with torchrun"):
        load_model(demo_model_path(), 256, pipeline=3)
