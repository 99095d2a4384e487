"""Real quantisers' checkpoints on the GPU backend, by the first tokens of their prompts.

All of them with whole prompts and greedy tokens, in half an hour of the interpreter: scripts/press/gpu_fixtures.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures import LOCAL_DATA, allowed_error, family_fixture_folders
from ropewalk.families import FAMILIES
from ropewalk.model.loader import load_model

pytest.importorskip("triton", reason="the kernels are written in Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, FEW_ROWS = (6, 4) if DEVICE == "cpu" else (120, 120)
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
    "qwen3moe-g4-32-act": "fp16",  # experts, with an order of features each
}
FAMILY_FOLDERS = {path.name: path for path in family_fixture_folders()}


@pytest.mark.parametrize("name, compute", OTHERS.items())
def test_logits_of_other_families_are_those_of_transformers(name: str, compute: str) -> None:
    if name not in FAMILY_FOLDERS:
        pytest.skip("the shared fixtures are not here")
    folder = FAMILY_FOLDERS[name]
    family = json.loads((folder / "config.json").read_text())["model_type"]
    if family not in FAMILIES:
        pytest.skip(f"{family} is no supported family")
    error = largest_error(folder, compute, "fp16" if compute == "fp16" else "fp32", FEW_ROWS)
    assert error <= (FP16_ERROR if compute == "fp16" else EXACT_ERROR)


def largest_error(folder: Path, compute: str, cache_type: str = "fp16", rows: int = ROWS) -> float:
    """Of the logits of the first tokens of the prompt."""
    with np.load(folder / "expected.npz") as arrays:
        want = dict(arrays)
    model = load_model(folder, backend="gpu", device=DEVICE, compute=compute, cache_type=cache_type)
    logits = model.forward(want["input_ids"].tolist()[:rows], model.new_cache(), logits="all").cpu().numpy()
    kept = want["logits_positions"] < len(logits)
    assert kept.any()
    return np.abs(logits[want["logits_positions"][kept]] - want["logits"][kept]).max()
