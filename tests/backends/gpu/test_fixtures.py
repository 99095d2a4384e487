"""Real quantisers' checkpoints on the GPU backend, by the first tokens of their prompts.

All of them with whole prompts and greedy tokens, in half an hour of the interpreter: scripts/press/gpu_fixtures.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures import LOCAL_DATA, allowed_error, family_fixture_folders
from ropewalk.model.loader import load_model

pytest.importorskip("triton", reason="the kernels are written in Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 6 if DEVICE == "cpu" else 120
FP16_ERROR = 2e-2  # of the fixtures' README, for float16 where transformers computes in float32
EXACT_ERROR = 2e-3  # of the same, where everything is float32
FOLDERS = sorted(path.parent for path in (LOCAL_DATA / "gptq").glob("*/fixture.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
@pytest.mark.parametrize("compute", ["fp16", "exact"])
def test_logits_are_those_of_transformers(folder: Path, compute: str) -> None:
    if compute == "exact" and folder.name not in ("g2-32-act-asym-v2", "g4-64-qwen2-bias") and DEVICE == "cpu":
        pytest.skip("the interpreter is slow: scripts/press/gpu_fixtures.py runs them all")
    error = largest_error(folder, compute)
    assert error <= (FP16_ERROR if compute == "fp16" else allowed_error(folder, "fp16").most)


OTHERS = {  # what the others of its kind do not have
    "gemma2-g4-32-act-swa16": "fp16",  # caps of scores and logits
    "gemma3-g4-32-act-swa12": "exact",  # two tables of angles
}


@pytest.mark.parametrize("name, compute", OTHERS.items())
def test_logits_of_other_families_are_those_of_transformers(name: str, compute: str) -> None:
    folder = {path.name: path for path in family_fixture_folders()}.get(name)
    if folder is None:
        pytest.skip("the shared fixtures are not here")
    error = largest_error(folder, compute, "fp16" if compute == "fp16" else "fp32")
    assert error <= (FP16_ERROR if compute == "fp16" else EXACT_ERROR)


def largest_error(folder: Path, compute: str, cache_type: str = "fp16") -> float:
    """Of the logits of the first tokens of the prompt."""
    with np.load(folder / "expected.npz") as arrays:
        want = dict(arrays)
    model = load_model(folder, backend="gpu", device=DEVICE, compute=compute, cache_type=cache_type)
    logits = model.forward(want["input_ids"].tolist()[:ROWS], model.new_cache(), logits="all").cpu().numpy()
    kept = want["logits_positions"] < len(logits)
    assert kept.any()
    return np.abs(logits[want["logits_positions"][kept]] - want["logits"][kept]).max()
