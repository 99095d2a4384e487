"""The bits of logits: the same for any chunk, any number of threads, and whatever the cache held before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures import LOCAL_DATA
from variants import Variant, variants

FOLDERS = ("g4-32-mistral-swa32", "g4-64-qwen2-bias")  # a window of 32 in 120 tokens; act-order and biases


@pytest.mark.parametrize("folder", [LOCAL_DATA / "gptq" / name for name in FOLDERS], ids=lambda path: path.name)
@pytest.mark.parametrize("cache_type", ["fp16", "fp32"])
@pytest.mark.parametrize("variant", variants(backend="cpu"), ids=str)
def test_logits_are_the_same_bits_for_any_chunk_and_threads(variant: Variant, cache_type: str, folder: Path) -> None:
    ids = np.load(folder / "expected.npz")["input_ids"].tolist()
    results = []
    for chunk, threads in ((2048, 1), (2048, 2), (2048, 5), (64, 3), (7, 2), (1, 1)):
        model = variant.load(folder, cache_type=cache_type, max_input_len=chunk, threads=threads)
        cache = model.new_cache()
        for _ in range(2):  # the second time over what the first left behind
            cache.truncate(0)
            results.append(model.forward(ids, cache, logits="all"))
    assert all(torch.equal(result, results[0]) for result in results[1:])
