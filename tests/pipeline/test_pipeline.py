"""backends/pipeline/: layer instances on several ranks, with the bits of one process.

Ranks are threads here, with the same messages over the same connections; test_processes.py has those of their own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.base.errors import CheckpointError, ConfigError, RankError
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.step import Span
from thread_ranks import start_ranks_as_threads

IDS = [(37 * i + 11) % 128 for i in range(150)]
LAYERS = 4
Load = Callable[..., Model]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(path, {"num_hidden_layers": LAYERS}, desc_act=True, sym=False)
    write_adapter(path / "storm", path, exact, 1)
    write_adapter(path / "ends", path, exact, 2, target_modules=["v_proj", "embed_tokens", "lm_head"])
    return path


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Load]:
    """Loads the model, and ends its ranks after the test."""
    start_ranks_as_threads(monkeypatch)
    loaded = []

    def load_with(**options: Any) -> Model:
        model = load_model(folder, 256, threads=1, **options)
        loaded.append(model)
        for name in ("storm", "ends"):
            model.load_adapter(folder / name, name)
        return model

    yield load_with
    for model in loaded:
        model.close()


def logits(model: Model, ids: list[int] = IDS, **options: Any) -> torch.Tensor:
    """Of all positions, in two calls and a third of one token."""
    cache = model.new_cache()
    cuts = [ids[:70], ids[70:-1], ids[-1:]]
    return torch.cat([model.forward(part, cache, "all", **options) for part in cuts])


@pytest.mark.parametrize("compute", ["int8", "exact"])
@pytest.mark.parametrize(("cache_type", "pipeline"), [("fp16", "2,2"), ("fp32", 3), ("q4+64", "0,1,3"), ("q8_q4", 2)])
def test_ranks_change_no_bit(load: Load, compute: str, cache_type: str, pipeline: Any) -> None:
    options = {"compute": compute, "cache_type": cache_type, "max_input_len": 24}
    model, plain = load(pipeline=pipeline, **options), load(**options)
    for adapters in (None, "storm", "ends+storm:0.5", "storm@1-2"):
        assert torch.equal(logits(model, adapters=adapters), logits(plain, adapters=adapters)), adapters


def test_rows_of_several_sequences_travel_together(load: Load) -> None:
    results = []
    for model in (load(pipeline=3), load()):
        caches = [model.new_cache() for _ in range(3)]
        first = [Span(IDS[:90], caches[0]), Span(IDS[3:8], caches[1], "all", "storm"), Span([5], caches[2])]
        found = model.step(first)
        for token in (7, 8):
            found += model.step([Span([token], cache, adapters=None) for cache in caches[::-1]])
        results.append(torch.cat(found))
    assert torch.equal(*results)


def test_pages_are_shared_copied_and_given_back_on_all_ranks(load: Load) -> None:
    results = []
    for model in (load(pipeline=2), load()):
        cache = model.new_cache()
        model.forward(IDS[:140], cache)
        model.share(cache)
        other, fork = model.new_cache(), model.fork(cache)
        assert model.attach(other, IDS) >= 128
        found = [model.forward(IDS[other.length :], other), model.forward([9], fork), model.forward([4], cache)]
        used = model.cache_used
        del cache, other, fork
        gc.collect()
        assert model.cache_used < used
        results.append((torch.cat(found), used, model.cache_used))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]


def test_keys_are_turned_and_shifted_on_all_ranks(load: Load) -> None:
    results = []
    for model in (load(pipeline="1,3"), load()):
        cache = model.new_cache()
        model.forward(IDS, cache)
        model.shift(cache, 10, 40)
        found = [model.forward([9], cache)]
        model.rescale(compress_pos_emb=2.0)
        found.append(model.forward([4], cache))
        results.append(torch.cat(found))
    assert torch.equal(*results)


@pytest.mark.parametrize("cache_type", ["fp16", "q4+64"])
def test_a_saved_cache_is_the_same_in_one_process_and_in_many(load: Load, tmp_path: Path, cache_type: str) -> None:
    models = load(pipeline="1,2,1", cache_type=cache_type), load(cache_type=cache_type)
    for number, (saves, loads) in enumerate((models, models[::-1])):
        cache = saves.new_cache()
        saves.forward(IDS, cache, adapters="storm")
        cache.save(tmp_path / str(number))
        back = loads.load_cache(tmp_path / str(number))
        assert torch.equal(saves.forward([9], cache), loads.forward([9], back))
        again = loads.new_cache()
        assert loads.attach(again, IDS) == 0  # adapters: nothing of it fits


def test_a_layer_that_runs_on_two_ranks_is_read_by_both(load: Load) -> None:
    order = "0-2,1-3,0"
    model, plain = load(pipeline="2,2,3", layer_order=order), load(layer_order=order)
    assert torch.equal(logits(model, adapters="storm"), logits(plain, adapters="storm"))
    assert model.weight_bytes > plain.weight_bytes
    assert model.weights.fingerprint == plain.weights.fingerprint
    assert load(pipeline=2).weight_bytes == plain.weight_bytes


def test_another_order_is_taken_where_its_layers_are_and_refused_elsewhere(load: Load) -> None:
    model, plain = load(pipeline="2,2"), load()
    for order in ("1,0,3,2,3", "0"):
        for each in (model, plain):
            each.set_layer_order(order)
        assert torch.equal(logits(model), logits(plain))
    with pytest.raises(ConfigError, match="instance 0 would run on rank 0 of the pipeline, and its layer was read by"):
        model.set_layer_order("3,0")


def test_the_reference_runs_on_ranks_too(load: Load, folder: Path) -> None:
    options = {"backend": "reference", "compute": "exact", "max_seq_len": 128}
    model, plain = load_model(folder, pipeline=2, **options), load_model(folder, **options)
    caches = model.new_cache(), plain.new_cache()
    assert torch.equal(model.forward(IDS[:9], caches[0]), plain.forward(IDS[:9], caches[1]))
    assert model.store.layout == f"pipeline-1 0,2 {plain.store.layout}"
    model.close()


def test_layers_of_a_second_model_are_read_by_their_ranks(load: Load, folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"num_hidden_layers": LAYERS}, seed=5)
    options = {"second_folder": tmp_path, "layer_order": "a:0-1,b:2-3,b:0"}
    model, plain = load(pipeline=3, **options), load(**options)
    assert torch.equal(logits(model), logits(plain))
    assert model.weights.second_fingerprint == plain.weights.second_fingerprint


def test_what_a_rank_cannot_read_is_its_error_here(load: Load, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"num_hidden_layers": LAYERS})
    (weights,) = tmp_path.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.3.input_layernorm.weight"][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"rank 1 of 2 \(layer instances .* to 3\): .*input_layernorm"):
        load_model(tmp_path, 64, pipeline=2)


def test_a_closed_pipeline_says_so(load: Load) -> None:
    model = load(pipeline=2)
    cache = model.new_cache()
    model.forward([1, 2], cache)
    model.close()
    model.close()
    with pytest.raises(RankError, match="the pipeline was closed: load the model again"):
        model.forward([3], cache)
