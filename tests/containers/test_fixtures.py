"""AWQ and compressed-tensors checkpoints of real tools against transformers, for every variant there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures import container_fixture_folders, measured
from ropewalk.model.loader import load_model
from ropewalk.model.step import Span
from variants import Variant, variants

EXACT_ERROR = 2e-3  # of the fixtures' README
MOST_KL = 3  # times that of a simulated quantisation of the activations, likewise
FP16_ERROR = 2e-2
ONE_OF_EACH = ("awq-gemm-g128", "ct-w4a16-g32-actgroup", "ct-w8a16-channel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FOLDERS = container_fixture_folders()
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
pytestmark = pytest.mark.skipif(not FOLDERS, reason="no fixtures of other containers on this machine")


def expected(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "expected.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def logits_at(folder: Path, variant: Variant, cache_type: str, want: dict[str, np.ndarray]) -> torch.Tensor:
    model = variant.load(folder, cache_type=cache_type, max_input_len=20)
    logits = model.forward(want["input_ids"].tolist(), model.new_cache(), logits="all")
    return logits[torch.from_numpy(want["logits_positions"])]  # [P, V]


@each
@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_exact_logits_are_those_of_transformers(folder: Path, variant: Variant) -> None:
    want = expected(folder)
    got = logits_at(folder, variant, "fp32", want)
    assert np.abs(got.numpy() - want["logits"]).max() <= EXACT_ERROR


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
    spans = [Span(ids[:length], whole.new_cache(), logits="all") for length in (len(ids), 5, 1)]
    for span, logits in zip(spans, whole.step(spans), strict=True):
        assert torch.equal(logits, want[: len(span.token_ids)])


@pytest.mark.parametrize("compute", ["fp16", "exact"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_gpu_backend_reads_the_same_weights(name: str, compute: str) -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    folder = next((path for path in FOLDERS if path.name == name), None)
    if folder is None:
        pytest.skip(f"no fixture {name} on this machine")
    want = expected(folder)
    cache_type = "fp16" if compute == "fp16" else "fp32"
    model = load_model(folder, backend="gpu", device=DEVICE, compute=compute, cache_type=cache_type)
    got = model.forward(want["input_ids"].tolist()[:4], model.new_cache(), logits="all").cpu().numpy()
    kept = want["logits_positions"] < len(got)
    assert kept.any()
    error = np.abs(got[want["logits_positions"][kept]] - want["logits"][kept]).max()
    assert error <= (FP16_ERROR if compute == "fp16" else EXACT_ERROR)
