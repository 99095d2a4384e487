"""Real quantisers' checkpoints on the GPU backend, by the first tokens of their prompts.

All of them with whole prompts and greedy tokens, in half an hour of the interpreter: scripts/press/gpu_fixtures.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures import LOCAL_DATA, allowed_error
from ropewalk.model.loader import load_model

pytest.importorskip("triton", reason="the kernels are written in Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 6 if DEVICE == "cpu" else 120
FP16_ERROR = 2e-2  # of the fixtures' README, for float16 where transformers computes in float32
FOLDERS = sorted(path.parent for path in (LOCAL_DATA / "gptq").glob("*/fixture.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
@pytest.mark.parametrize("compute", ["fp16", "exact"])
def test_logits_are_those_of_transformers(folder: Path, compute: str) -> None:
    if compute == "exact" and folder.name not in ("g2-32-act-asym-v2", "g4-64-qwen2-bias") and DEVICE == "cpu":
        pytest.skip("the interpreter is slow: scripts/press/gpu_fixtures.py runs them all")
    with np.load(folder / "expected.npz") as arrays:
        want = dict(arrays)
    model = load_model(folder, backend="gpu", device=DEVICE, compute=compute)
    logits = model.forward(want["input_ids"].tolist()[:ROWS], model.new_cache(), logits="all").cpu().numpy()
    kept = want["logits_positions"] < len(logits)
    assert kept.any()
    error = np.abs(logits[want["logits_positions"][kept]] - want["logits"][kept]).max()
    assert error <= (FP16_ERROR if compute == "fp16" else allowed_error(folder, "fp16").most)
