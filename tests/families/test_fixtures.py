"""Checkpoints of many families against transformers on the same dequantised weights, for every variant there is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures import family_fixture_folders, measured
from ropewalk.families import FAMILIES
from ropewalk.model.loader import load_model
from ropewalk.model.step import Span
from variants import Variant, variants

EXACT_ERROR = 2e-3  # of the fixtures' README
MOST_KL = 3  # times that of a simulated quantisation of the activations, likewise

FOLDERS = [
    folder
    for folder in family_fixture_folders()
    if json.loads((folder / "config.json").read_text())["model_type"] in FAMILIES
]
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
pytestmark = pytest.mark.skipif(not FOLDERS, reason="no fixtures of other families on this machine")


def expected(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "expected.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def logits_at(folder: Path, variant: Variant, cache_type: str, want: dict[str, np.ndarray]) -> torch.Tensor:
    model = variant.load(folder, cache_type=cache_type, max_input_len=20, head_bits="16")
    logits = model.forward(want["input_ids"].tolist(), model.new_cache(), logits="all")
    return logits[torch.from_numpy(want["logits_positions"])]  # [P, V]


@each
@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_exact_logits_are_those_of_transformers(folder: Path, variant: Variant) -> None:
    want = expected(folder)
    assert np.abs(logits_at(folder, variant, "fp32", want).numpy() - want["logits"]).max() <= EXACT_ERROR


@each
@pytest.mark.parametrize("variant", variants(compute="int8"), ids=str)
def test_int8_logits_diverge_no_more_than_simulated(folder: Path, variant: Variant) -> None:
    want = expected(folder)
    got = logits_at(folder, variant, "fp16", want)
    p, q = (torch.log_softmax(torch.as_tensor(rows).double(), -1) for rows in (want["logits"], got))
    simulated = measured(folder, "simulated_error", "q8_block32_activations", "kl_mean")
    assert float((p.exp() * (p - q)).sum(-1).mean()) <= MOST_KL * simulated


@each
def test_chunks_and_batches_change_no_bit(folder: Path) -> None:
    ids = expected(folder)["input_ids"].tolist()
    whole = load_model(folder, threads=1, backend="cpu")
    chunked = load_model(folder, threads=2, backend="cpu", max_input_len=7)
    want = whole.forward(ids, whole.new_cache(), logits="all")
    assert torch.equal(chunked.forward(ids, chunked.new_cache(), logits="all"), want)
    lengths = (len(ids), 5, 1)
    spans = [Span(ids[:length], whole.new_cache(), "all", seq_len=len(ids)) for length in lengths]
    for span, logits in zip(spans, whole.step(spans), strict=True):
        assert torch.equal(logits, want[: len(span.token_ids)])
