"""Exported layers of families whose layers differ, or add what a norm gives: transformers computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ropewalk.model.export.layers import export_layers
from ropewalk.model.loader import load_model
from their_folder import logits_of, save_model

IDS = [(37 * i + 11) % 120 + 3 for i in range(40)]
MOST_ERROR = 3e-5  # of the largest logit: both sides compute in float32
ORDER = "0-2,1*2@0.5,3"
FOUR = {"num_hidden_layers": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 9}),  # norms of 1 + weight are added
    "gemma3_text": ("gemma3_text", {"head_dim": 16, "sliding_window": 9}),
    "cohere2": ("cohere2", {"sliding_window": 9}),
    "glm4": ("glm4", {"head_dim": 16}),
    "starcoder2": ("starcoder2", {}),
    "gpt_neox": ("gpt_neox", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_it_and_computes_the_same(tmp_path: Path, name: str) -> None:
    family, settings = CASES[name]
    save_model(tmp_path / "in", family, **FOUR, **settings)
    ours = load_model(tmp_path / "in", layer_order=ORDER, backend="reference", compute="exact", cache_type="fp32")
    want = ours.forward(IDS, ours.new_cache(), logits="all")
    export_layers(tmp_path / "in", tmp_path / "out", ORDER)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    assert (logits_of(theirs, IDS) - want).abs().max() <= MOST_ERROR * want.abs().max()
