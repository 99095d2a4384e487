"""Perplexity by position, and what is kept of windows: against the log probabilities of whole logits."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk.base.errors import RequestError
from ropewalk.generate.evaluate import BlockSums, perplexity, read_windows, stretches
from ropewalk.measure.compare import compare_perplexity, compare_positions, positions_csv
from ropewalk.measure.positions import by_position, check_bin, default_bin
from ropewalk.measure.record import Record, text_facts
from ropewalk.measure.settings import facts_of
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.variants import Variant, open_variant, scaling_variant

IDS = np.random.default_rng(3).integers(0, 64, 900).tolist()
LENGTH = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, {"vocab_size": 64, "max_position_embeddings": 128})
    return load_model(folder, max_seq_len=256, backend="reference", compute="exact", cache_type="fp32")


@pytest.fixture(scope="module")
def nlls(model: Model) -> np.ndarray:
    """[4, LENGTH - 1] float64, by the definition."""
    rows = []
    for start in range(0, 800, LENGTH):
        window = IDS[start : start + LENGTH]
        logs = torch.log_softmax(model.forward(window, model.new_cache(), logits="all").double(), dim=1)
        rows.append([-float(logs[i, window[i + 1]]) for i in range(LENGTH - 1)])
    return np.array(rows)


def test_bins_are_means_over_their_positions_in_all_windows(model: Model, nlls: np.ndarray) -> None:
    windows = read_windows(model, IDS, LENGTH, lambda count: None)
    rows = by_position(windows, 64)
    assert [(row.start, row.end) for row in rows] == [(0, 64), (64, 128), (128, 192), (192, 200)]
    assert [row.num_scored for row in rows] == [4 * 63, 4 * 64, 4 * 64, 4 * 8]
    for row in rows:
        part = nlls[:, max(row.start, 1) - 1 : row.end - 1]
        assert row.mean_nll == pytest.approx(part.mean(), rel=1e-6)
        assert row.nll_error == pytest.approx(part.mean(1).std(ddof=1) / 2, rel=1e-6)  # four windows
        assert row.perplexity == pytest.approx(math.exp(part.mean()))


def test_one_bin_of_everything_is_the_perplexity_by_length(model: Model) -> None:
    windows = read_windows(model, IDS, 128, lambda count: None)
    (row,), (whole,) = by_position(windows, 128), perplexity(model, IDS, [128])
    assert row.mean_nll == whole.mean_nll and row.num_scored == whole.num_scored


def test_samples_are_stretches_of_text(model: Model) -> None:
    short = [BlockSums(128, (float(i), 0.0), 0.0) for i in range(9)]
    sums, counts = stretches(short, 0, 128)
    assert sums == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7, 8] and counts == [4 * 127, 4 * 127, 127]
    long = [BlockSums(1024, tuple(float(i) for i in range(16)), 0.0) for _ in range(2)]
    sums, counts = stretches(long, 0, 1024)
    assert sums == 2 * [float(sum(range(8))), float(sum(range(8, 16)))] and counts == 2 * [511, 512]
    assert stretches(long, 64, 192) == ([3.0, 3.0], [128, 128])


def test_a_record_serves_lengths_and_positions_and_goes_on(model: Model, tmp_path: Path) -> None:
    path, variants = tmp_path / "record.json", [scaling_variant(model, name, 2.0) for name in ("none", "yarn")]

    def record() -> Record:
        return Record(path, "perplexity", text_facts(IDS))

    whole = compare_perplexity(model, IDS, [64, 128], variants)
    done = []
    part = compare_perplexity(
        model, IDS, [64, 128], variants, None, lambda *step: done.append(step), lambda: len(done) > 9, record()
    )
    assert sum(len(curve.rows) for curve in part) < 4
    kept = record().part("none", _facts(model, variants[0]))
    assert 0 < len(kept) < 20
    again = compare_perplexity(model, IDS, [64, 128], variants, record=record())
    for ours, theirs in zip(again, whole, strict=True):
        assert [(row.mean_nll, row.nll_error) for row in ours.rows] == [(r.mean_nll, r.nll_error) for r in theirs.rows]
    before = path.stat().st_mtime_ns
    curves = compare_positions(model, IDS, 128, 64, variants, record=record())
    assert path.stat().st_mtime_ns == before  # nothing was left to measure
    assert curves == compare_positions(model, IDS, 128, 64, variants)


def _facts(model: Model, variant: Variant) -> dict:
    return facts_of(open_variant(model, variant, 128)[0])


def test_a_record_of_another_rope_under_the_same_name_is_refused(model: Model, tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json", "perplexity", text_facts(IDS))
    compare_perplexity(model, IDS, [64], [scaling_variant(model, "yarn", 2.0)], record=record)
    with pytest.raises(RequestError, match=r"yarn: RoPE was .*factor=2.* when it was begun, and is .*factor=4"):
        compare_perplexity(model, IDS, [64], [scaling_variant(model, "yarn", 4.0)], record=record)


def test_the_table_has_a_line_per_bin(model: Model) -> None:
    curves = compare_positions(model, IDS, 128, 64, [scaling_variant(model, "none", 1.0)])
    rows = list(csv.DictReader(io.StringIO(positions_csv(curves))))
    assert [(row["variant"], row["start"], row["end"], row["windows"]) for row in rows] == [
        ("none", "0", "64", "7"),
        ("none", "64", "128", "7"),
    ]
    assert float(rows[1]["perplexity"]) == pytest.approx(curves[0].rows[1].perplexity, abs=1e-4)


@pytest.mark.parametrize("size", [0, 32, 65, 256, -64])
def test_other_bins_are_refused(size: int) -> None:
    with pytest.raises(RequestError, match=f"a multiple of 64 of at most 200 tokens, got {size}"):
        check_bin(size, 200)


@pytest.mark.parametrize(("length", "size"), [(64, 64), (1024, 64), (1025, 128), (8192, 512), (131_072, 8192)])
def test_there_are_sixteen_bins_at_most(length: int, size: int) -> None:
    assert default_bin(length) == size
