"""Caches that were turned or shifted: they come back as what they are, and as nobody else's prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk.base.errors import SavedCacheError
from variants import Variant

IDS = [(37 * place) % 128 for place in range(150)]


@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 4.0}])
def test_a_moved_cache_goes_on_as_before(tmp_path: Path, scaling: dict | None) -> None:
    write_checkpoint(tmp_path / "model", {"max_position_embeddings": 64})
    options = {"max_seq_len": 256, "rope_scaling": scaling}
    models = [Variant("cpu", "int8").load(tmp_path / "model", **options) for _ in range(2)]
    cache = models[0].new_cache()
    models[0].forward(IDS[:100], cache, "none")
    models[0].forward(IDS[100:], cache, "none")  # with dynamic scaling it outgrows its length
    models[0].shift(cache, 20, 30)
    cache.save(tmp_path / "kept")
    again = models[1].load_cache(tmp_path / "kept")
    assert again.whole_segments == cache.whole_segments and again.was_moved
    assert models[1].reusable_prefix(again, [*again.token_ids, 1]) == models[0].reusable_prefix(
        cache, [*cache.token_ids, 1]
    )
    for token_ids in ([5], [6, 7] * 40):
        assert torch.equal(models[1].forward(token_ids, again), models[0].forward(token_ids, cache))


def test_turned_keys_need_the_rope_that_they_were_turned_to(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", {"max_position_embeddings": 64})
    model = Variant("cpu", "int8").load(tmp_path / "model", max_seq_len=256)
    cache = model.new_cache()
    model.forward(IDS, cache, "none")
    model.rescale({"rope_type": "linear", "factor": 2.0})
    cache.save(tmp_path / "kept")
    again = model.load_cache(tmp_path / "kept")
    assert torch.equal(model.forward([5], again), model.forward([5], cache))
    other = Variant("cpu", "int8").load(tmp_path / "model", max_seq_len=256)
    with pytest.raises(SavedCacheError, match="rotated in another way"):
        other.load_cache(tmp_path / "kept")
