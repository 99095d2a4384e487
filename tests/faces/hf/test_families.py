"""The transformers class on other families: `generate` gives the tokens of their own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ropewalk.hf import from_pretrained
from their_folder import save_model


@pytest.mark.parametrize(
    "family, settings", [("gemma2", {"head_dim": 16, "sliding_window": 17}), ("gpt_neox", {}), ("phi3", {})]
)
def test_greedy_generation_is_that_of_the_family(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    theirs = save_model(tmp_path, family, **settings)
    ours = from_pretrained(tmp_path, backend="reference", compute="exact", cache_type="fp32")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
