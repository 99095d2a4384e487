"""`ropewalk gpu` and `ropewalk gpu warm-up`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk.backends.gpu import device as gpu
from ropewalk.faces.cli.main import main
from ropewalk.model import warm_up as module
from ropewalk.model.loader import load_model
from ropewalk.model.warm_up import warm_up
from tokenizer_writer import write_sentencepiece


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, {"num_hidden_layers": 1, "vocab_size": 400})
    return write_sentencepiece(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_a_machine_without_a_card_is_told_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="Triton is part of what is told")
    assert main(["gpu"]) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"torch {torch.__version__}; Triton: ready"
    assert second.startswith("cuda: ")
    assert third == 'backend "auto" takes "cpu": torch sees no GPU'


def test_every_card_is_named_with_what_it_lacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks = {0: None, 1: "Card 1 has compute capability 7.5, and 8.0 (Ampere) is needed"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "missing", lambda device: lacks[device.index])
    monkeypatch.setattr(gpu, "describe", lambda device: f"Card {device.index}")
    assert main(["gpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "cuda:0: Card 0: ready",
        f"cuda:1: Card 1: {lacks[1]}",
        'backend "auto" takes "gpu": this machine has Card 0',
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter, with tiny prompts")
def test_warming_up_loads_a_model_for_the_gpu_and_runs_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    monkeypatch.setattr(module, "PROMPTS", (1, 2))
    monkeypatch.setattr(module, "LONG", 3)
    assert main(["gpu", "warm-up", str(folder), "--device", "cpu", "--max-seq-len", "64"]) == 0
    assert "7 steps have run on gpu (cpu)" in capsys.readouterr().err


def test_warming_up_runs_few_rows_and_many_and_reports_every_step(folder: Path) -> None:
    model = load_model(folder, max_seq_len=600, threads=1)
    rows: list[list[int]] = []
    step, seen = model.step, []
    model.step = lambda spans: rows.append([len(span.token_ids) for span in spans]) or step(spans)
    assert warm_up(model, lambda done, total: seen.append((done, total))) == len(rows)
    assert rows == [[1], [2], [17], [33], [65], [520], [1], [1], [1], [1, 1]]
    assert seen == [(done, len(rows)) for done in range(1, len(rows) + 1)]
    assert model.cache_used == 0


def test_a_short_context_is_enough_to_warm_up(folder: Path) -> None:
    assert warm_up(load_model(folder, max_seq_len=16, threads=1)) == 7
