"""A saved cache fits one model, loaded in one way: each other way is refused with what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptq_writer import write_checkpoint
from ropewalk.base.errors import RequestError, SavedCacheError
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model

IDS = [(37 * i) % 128 for i in range(100)]
CONFIG = {"vocab_size": 128, "num_hidden_layers": 4}


def load(folder: Path, **options: Any) -> Model:
    return load_model(folder, **({"backend": "cpu", "compute": "int8", "threads": 1} | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_checkpoint(made, CONFIG)
    return made


@pytest.fixture(scope="module")
def kept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of that model, saved."""
    path = tmp_path_factory.mktemp("saved") / "kept"
    model = load(folder)
    cache = model.new_cache()
    model.forward(IDS, cache)
    cache.save(path)
    return path


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compute": "exact"}, "arithmetic: 'cpu int8 .*' in the file, 'cpu exact"),
        ({"isa": "scalar"}, "arithmetic: 'cpu int8 .*' in the file, 'cpu int8 scalar' here"),
        ({"backend": "reference", "threads": None}, "arithmetic: .* 'reference int8 cpu' here; page layout"),
        ({"cache_type": "fp32"}, "cache type: 'fp16' in the file, 'fp32' here"),
        ({"layer_order": "0-2,1-3"}, "layer order: '0-3' in the file, '0-2,1-3' here"),
        ({"compress_pos_emb": 4.0}, "rotated in another way .*scaling: none.* than this model .*linear"),
        ({"rope_theta": 5000.0}, "rotated in another way .*theta 10000.* than this model .*theta 5000"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotated in another way .*yarn"),
        ({"max_seq_len": 64}, "has 100 positions, and the model was loaded for 64"),
    ],
)
def test_a_model_that_was_loaded_in_another_way_is_refused(
    options: dict[str, Any], message: str, folder: Path, kept: Path
) -> None:
    with pytest.raises(SavedCacheError, match=message):
        load(folder, **options).load_cache(kept)


@pytest.mark.parametrize(
    "config, options, message",
    [
        ({"num_hidden_layers": 3}, {}, "num_layers: 4 in the file, 3 here; weights: "),
        ({"rms_norm_eps": 1e-3}, {}, "rms_norm_eps: "),
        ({}, {"seed": 1}, r"\(weights: '[0-9a-f]+' in the file, '[0-9a-f]+' here\)"),
        ({}, {"bits": 8}, "quantisation: 'bits=4"),
        ({}, {"dense": True}, "quantisation: .* None here"),
        ({"sliding_window": 32}, {"family": "mistral"}, "family: 'llama' in the file, 'mistral' here"),
    ],
)
def test_another_model_is_refused(
    config: dict[str, Any], options: dict[str, Any], message: str, kept: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, CONFIG | config, **options)
    with pytest.raises(SavedCacheError, match=message) as caught:
        load(tmp_path).load_cache(kept)
    assert str(kept) in str(caught.value) and "load the model that it belongs to" in str(caught.value)


def test_a_moved_copy_of_the_model_is_the_same_model(folder: Path, kept: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "moved", CONFIG, shards=2)
    assert load(tmp_path / "moved").load_cache(kept).token_ids == IDS


def test_the_second_model_counts_where_its_layers_run(folder: Path, kept: Path, tmp_path: Path) -> None:
    for name, seed in (("b", 1), ("c", 2)):
        write_checkpoint(tmp_path / name, CONFIG, seed=seed)
    assert load(folder, second_folder=tmp_path / "b").load_cache(kept).length == 100
    both = load(folder, second_folder=tmp_path / "b", layer_order="a:0-1,b:2-3")
    cache = both.new_cache()
    both.forward(IDS, cache)
    cache.save(tmp_path / "kept")
    same = load(folder, second_folder=tmp_path / "b", layer_order="a:0-1,b:2-3")
    assert same.load_cache(tmp_path / "kept").length == 100
    with pytest.raises(SavedCacheError, match="second model: '[0-9a-f]+' in the file"):
        load(folder, second_folder=tmp_path / "c", layer_order="a:0-1,b:2-3").load_cache(tmp_path / "kept")


def test_a_changed_layer_order_is_refused_and_changed_back_is_not(folder: Path, kept: Path) -> None:
    model = load(folder)
    model.set_layer_order("0-2,1-3")
    with pytest.raises(SavedCacheError, match="layer order"):
        model.load_cache(kept)
    model.set_layer_order(None)
    assert model.load_cache(kept).length == 100


FOLDERS = sorted((demo_model_path() / "adapters").iterdir())


def load_embedded(**folders: Path) -> Model:
    """The embedded model, with these adapters loaded in this order."""
    model = load_model(demo_model_path(), backend="cpu", max_seq_len=512)
    for name, folder in folders.items():
        model.load_adapter(folder, name)
    return model


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that was computed with two adapters, saved."""
    path = tmp_path_factory.mktemp("saved") / "kept"
    model = load_embedded(a=FOLDERS[0], b=FOLDERS[1])
    cache = model.new_cache()
    model.forward(IDS, cache, adapters="a+b:0.5")
    cache.save(path)
    return path


def test_an_adapter_that_is_not_loaded_is_named(adapted: Path) -> None:
    with pytest.raises(SavedCacheError, match=r"the adapter 'a' .* is not loaded \(loaded: 'b'"):
        load_embedded(b=FOLDERS[1]).load_cache(adapted)


def test_another_adapter_of_the_same_name_does_not_count(adapted: Path) -> None:
    with pytest.raises(SavedCacheError, match="the adapter 'a' that it was computed with is not loaded"):
        load_embedded(a=FOLDERS[2], b=FOLDERS[1]).load_cache(adapted)


def test_an_order_of_loading_that_sums_in_another_order_is_refused(adapted: Path) -> None:
    with pytest.raises(SavedCacheError, match="loaded in another order, 'a', 'b': load them in that order"):
        load_embedded(b=FOLDERS[1], a=FOLDERS[0]).load_cache(adapted)


def test_an_adapter_that_has_been_unloaded_cannot_be_named_in_a_file(tmp_path: Path) -> None:
    model = load_embedded(a=FOLDERS[0])
    cache = model.new_cache()
    model.forward(IDS, cache, adapters="a")
    model.unload_adapter("a")
    with pytest.raises(RequestError, match="has been unloaded: load it again"):
        cache.save(tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []
