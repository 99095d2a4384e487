"""generate/evaluate.py: perplexity against its definition, and against transformers' own loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk.base.errors import RequestError
from ropewalk.generate import evaluate
from ropewalk.generate.evaluate import PerplexityRow, perplexity
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model

IDS = np.random.default_rng(3).integers(0, 64, 150).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dynamic NTK from 16 positions on: windows of 32 need the frequencies of 32 from their first token."""
    folder = tmp_path_factory.mktemp("model")
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    overrides = {"vocab_size": 64, "max_position_embeddings": 16, "rope_scaling": scaling}
    torch.save(write_checkpoint(folder, overrides), folder / "exact.pt")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, max_seq_len=64, backend="reference", compute="exact", cache_type="fp32")


def expected_nll(model: Model, ids: list[int], length: int) -> float:
    """The definition, each window in one call."""
    values = []
    for first in range(0, len(ids) // length * length, length):
        window = ids[first : first + length]
        log_p = torch.log_softmax(model.forward(window, model.new_cache(), logits="all").double(), dim=-1)
        values += [-float(log_p[i, window[i + 1]]) for i in range(length - 1)]
    return sum(values) / len(values)


@pytest.mark.parametrize("block_rows", [1, 5, 1000])
def test_perplexity_is_that_of_the_definition_whatever_the_block(model: Model, monkeypatch, block_rows: int) -> None:
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 4 * 64 * block_rows)
    rows = perplexity(model, IDS, [8, 32])
    used = IDS[:128]  # whole windows of the longest length, for every length
    assert [(row.length, row.num_windows, row.num_scored) for row in rows] == [(8, 16, 112), (32, 4, 124)]
    for row in rows:
        assert row.mean_nll == pytest.approx(expected_nll(model, used, row.length), rel=1e-5)
        assert row.perplexity == pytest.approx(math.exp(row.mean_nll))
        assert row.tokens_per_s > 0


def test_perplexity_is_the_loss_of_transformers(folder: Path, model: Model) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    theirs.load_state_dict(torch.load(folder / "exact.pt"))
    windows = torch.tensor(IDS[:128]).view(4, 32)
    with torch.no_grad():
        loss = np.mean([float(theirs(window[None], labels=window[None]).loss) for window in windows])
    assert perplexity(model, IDS, [32])[0].mean_nll == pytest.approx(loss, rel=1e-4)


def test_max_tokens_limits_the_text(model: Model) -> None:
    assert perplexity(model, IDS, [8, 16], max_tokens=50)[0].num_windows == 6


def test_progress_reaches_the_total_over_all_lengths(model: Model) -> None:
    calls = []
    perplexity(model, IDS, [8, 32], progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (256, 256)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_cancelling_returns_the_finished_lengths(model: Model) -> None:
    done_tokens = 0

    def progress(done: int, total: int) -> None:
        nonlocal done_tokens
        done_tokens = done

    rows = perplexity(model, IDS, [8, 32], progress=progress, cancelled=lambda: done_tokens >= 160)
    assert [row.length for row in rows] == [8]


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (IDS, [], "no context lengths"),
        (IDS, [1], "at least 2, got 1"),
        (IDS, [8, 2.5], "at least 2, got 2.5"),
        (IDS, [65], "more than the 64 positions .* max_seq_len=65"),
        (IDS[:31], [8, 32], "the text has 31 tokens, but one window of the longest length needs 32"),
        ([], [8], "no token ids"),
        ([64] * 32, [8], "out of range"),
    ],
)
def test_what_cannot_be_measured_is_refused(model: Model, ids: list[int], lengths: list, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        perplexity(model, ids, lengths)


def test_a_hopeless_model_has_infinite_perplexity_instead_of_an_overflow() -> None:
    assert PerplexityRow(8, 1, 7, 1e4, 0.0).perplexity == math.inf
    assert PerplexityRow(8, 1, 7, 1e4, 0.0).tokens_per_s == 0.0
