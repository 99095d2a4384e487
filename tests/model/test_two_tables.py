"""Models whose layers turn their keys by different tables, or not at all: what follows the RoPE, and what stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from their_folder import save_model
from variants import variants

IDS = [(37 * i + 11) % 120 + 3 for i in range(70)]
LINEAR = {"rope_type": "linear", "factor": 4.0}
BACKENDS = sorted({variant.backend for variant in variants()})
MOST_ERROR = 3e-5  # of the largest logit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0 has a window and a theta of its own, layer 1 has neither."""
    path = tmp_path_factory.mktemp("gemma3")
    types = ["sliding_attention", "full_attention"]
    save_model(path, "gemma3_text", head_dim=16, sliding_window=50, layer_types=types)
    return path


def loaded(folder: Path, backend: str, **options: object) -> Model:
    return load_model(folder, backend=backend, compute="exact", cache_type="fp32", **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_have_the_table_of_their_kind(folder: Path, backend: str) -> None:
    model = loaded(folder, backend)
    assert model.rotations == (1, 0)
    model.set_layer_order("1,0,1")
    assert model.rotations == (0, 1, 0)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_rope_turns_the_keys_of_layers_that_follow_it(folder: Path, backend: str, layer: int) -> None:
    """With one layer nothing but rotations tells a cache that was turned from a fresh one."""
    model = loaded(folder, backend, layer_order=str(layer))
    cache, plain = model.new_cache(), model.new_cache()
    model.forward(IDS[:-1], plain, logits="none")
    before = model.forward(IDS[-1:], plain)
    model.forward(IDS[:-1], cache, logits="none")
    model.rescale(LINEAR, mode="rotate", caches=[cache])
    got = model.forward(IDS[-1:], cache)
    fresh = loaded(folder, backend, layer_order=str(layer), rope_scaling=LINEAR)
    want = fresh.forward(IDS, fresh.new_cache())
    assert (got - want).abs().max() <= MOST_ERROR * want.abs().max()
    if layer == 0:
        assert torch.equal(got, before)  # not even rounded anew
    else:
        assert (got - before).abs().max() > 100 * MOST_ERROR * want.abs().max()


@pytest.mark.parametrize("family, settings", [("gemma3_text", {"head_dim": 16}), ("cohere2", {"num_hidden_layers": 4})])
def test_a_cache_is_saved_and_found_again(tmp_path: Path, family: str, settings: dict) -> None:
    save_model(tmp_path / "model", family, sliding_window=50, **settings)
    model, again = (loaded(tmp_path / "model", "reference") for _ in range(2))
    cache = model.new_cache()
    model.forward(IDS[:-1], cache, logits="none")
    cache.save(tmp_path / "cache")
    restored = again.load_cache(tmp_path / "cache")
    assert torch.equal(again.forward(IDS[-1:], restored), model.forward(IDS[-1:], cache))
