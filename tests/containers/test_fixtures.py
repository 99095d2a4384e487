"""AWQ and compressed-tensors checkpoints of real tools against transformers, for every variant there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fixture_logits import EXACT_ERROR, check_bits, check_exact, check_int8, expected
from fixtures import container_fixture_folders
from ropewalk.model.loader import load_model
from variants import Variant, variants

FP16_ERROR = 2e-2
ONE_OF_EACH = ("awq-gemm-g128", "ct-w4a16-g32-actgroup", "ct-w8a16-channel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FOLDERS = container_fixture_folders()
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
pytestmark = pytest.mark.skipif(not FOLDERS, reason="no fixtures of other containers on this machine")


@each
@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_exact_logits_are_those_of_transformers(folder: Path, variant: Variant) -> None:
    check_exact(folder, variant)


@each
@pytest.mark.parametrize("variant", variants(compute="int8"), ids=str)
def test_int8_logits_diverge_no_more_than_simulated(folder: Path, variant: Variant) -> None:
    check_int8(folder, variant)


@each
def test_chunks_and_batches_change_no_bit(folder: Path) -> None:
    check_bits(folder)


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
