"""Adapters for families whose linears are fused, or whose rows are brought into another order: the logits of PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from ropewalk.base.errors import CheckpointError
from ropewalk.model.loader import load_model
from their_folder import logits_of, save_model

IDS = [(37 * i + 11) % 120 + 3 for i in range(40)]
MOST_ERROR = 3e-5  # of the largest logit: both sides compute in float32
CASES: dict[str, tuple[str, dict[str, Any], list[str] | str]] = {
    "rotated-pairs": ("cohere", {"use_qk_norm": True}, "all-linear"),
    "half-rotated-pairs": ("glm4", {"head_dim": 16}, ["q_proj", "k_proj", "gate_up_proj"]),
    "head-by-head": ("gpt_neox", {}, ["query_key_value", "dense_4h_to_h"]),
    "fused": ("phi3", {}, ["qkv_proj", "gate_up_proj", "o_proj"]),
    "no-gate": ("starcoder2", {}, ["c_fc", "c_proj", "v_proj"]),
    "embeddings": ("gpt_neox", {}, ["embed_in", "dense"]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_gives_the_logits_of_peft(tmp_path: Path, name: str) -> None:
    family, settings, targets = CASES[name]
    theirs = save_model(tmp_path / "model", family, **settings)
    plain = logits_of(theirs, IDS)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    want = logits_of(adapted, IDS)
    model = load_model(tmp_path / "model", backend="reference", compute="exact", cache_type="fp32")
    model.load_adapter(tmp_path / "adapter", "storm")
    got = model.forward(IDS, model.new_cache(), logits="all", adapters="storm")
    assert (got - want).abs().max() <= MOST_ERROR * want.abs().max()
    assert (want - plain).abs().max() > 0.1 * want.abs().max()  # it matters


def test_an_adapter_of_another_family_is_refused(tmp_path: Path) -> None:
    theirs = save_model(tmp_path / "phi3", "phi3")
    save_model(tmp_path / "cohere", "cohere")
    config = peft.LoraConfig(r=3, target_modules=["qkv_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "cohere", backend="reference")
    with pytest.raises(CheckpointError, match="qkv_proj.*is for a module that this model .*cohere, 2 layers"):
        model.load_adapter(tmp_path / "adapter", "storm")
