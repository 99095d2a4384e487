"""A model runs what its layer order says, its caches follow, and info shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accuracy import assert_as_accurate
from gptq_writer import write_checkpoint
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.config.layer_order import (
    LayerOrder,
)
from ropewalk.engine.engine import Engine
from ropewalk.generate.sampling import SamplingParams
from ropewalk.model.info import model_info
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_sentencepiece
from transformers_model import Logits
from transformers_model import their_logits as logits_of_transformers
from variants import Variant, variants

NUM_LAYERS = 4


IDS = [(37 * i) % 128 for i in range(40)]


RUNS = variants(compute="exact")


CORE = Variant("cpu", "exact")  # the same bits however a sequence is cut


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GPTQ act-order model of four layers and its float weights."""
    folder = tmp_path_factory.mktemp("model")
    return folder, write_checkpoint(folder, {"num_hidden_layers": NUM_LAYERS}, desc_act=True, sym=False)


@pytest.fixture(scope="module")
def folder(exact: tuple[Path, dict[str, torch.Tensor]]) -> Path:
    return exact[0]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A dense model of equal shapes, another vocabulary and five layers."""
    folder = tmp_path_factory.mktemp("other")
    overrides = {"num_hidden_layers": NUM_LAYERS + 1, "vocab_size": 96}
    return folder, write_checkpoint(folder, overrides, dense=True, seed=5)


def reference(folder: Path, **options) -> Model:
    return load_model(folder, backend="reference", compute="exact", cache_type="fp32", **options)


def run(model: Model, ids: list[int] = IDS) -> torch.Tensor:
    return model.forward(ids, model.new_cache(), logits="all")


def their_logits(
    folder: Path, order: LayerOrder, exact: dict[str, torch.Tensor], other: dict[str, torch.Tensor] | None = None
) -> Logits:
    """transformers' model with the layers of `order` written out; a weight is multiplied into what a layer adds."""
    state = {name: tensor for name, tensor in exact.items() if not name.startswith("model.layers.")}
    for position, use in enumerate(order.uses):
        prefix, weights = f"model.layers.{use.layer}.", exact if use.source == "a" else other
        for name in (name for name in weights if name.startswith(prefix)):
            part = name.removeprefix(prefix)
            factor = use.weight if part.startswith(("self_attn.o_proj", "mlp.down_proj")) else 1.0
            state[f"model.layers.{position}.{part}"] = weights[name].double() * factor
    return logits_of_transformers(folder, state, IDS, num_hidden_layers=len(order))


ORDERS = ["0-3,0-3", "0-1,2*4@0.25,3", "3,2,1,0", "2", "0-3,1@-0.5,0-3@0.7"]


@pytest.mark.parametrize("variant", variants(), ids=str)
def test_the_plain_order_changes_no_bit(folder: Path, variant: Variant) -> None:
    plain = run(variant.load(folder))
    assert torch.equal(run(variant.load(folder, layer_order="0-3")), plain)
    model = variant.load(folder, layer_order="3,0")
    assert not torch.equal(run(model), plain)
    model.set_layer_order([0, 1, 2, 3])
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("text", ORDERS)
@pytest.mark.parametrize("variant", RUNS, ids=str)
def test_any_order_is_that_of_a_transformers_model_built_by_hand(exact, variant: Variant, text: str) -> None:
    folder, weights = exact
    model = variant.load(folder, cache_type="fp32", layer_order=text, max_input_len=7)
    expected = their_logits(folder, model.layer_order, weights)
    assert_as_accurate(run(model), *expected)
    changed = variant.load(folder, cache_type="fp32", max_input_len=7)
    changed.set_layer_order(text)
    assert torch.equal(run(changed), run(model))


@pytest.mark.parametrize("variant", RUNS, ids=str)
def test_layers_of_two_models_are_those_of_a_model_built_by_hand(exact, other, variant: Variant) -> None:
    folder, weights = exact
    order = "a:0-1,b:1-4,a:2-3,b:0@0.5"
    model = variant.load(folder, cache_type="fp32", second_folder=other[0], layer_order=order)
    expected = their_logits(folder, model.layer_order, weights, other[1])
    assert_as_accurate(run(model), *expected)
    model.set_layer_order("0-3")
    assert torch.equal(run(model), run(variant.load(folder, cache_type="fp32")))


@pytest.mark.parametrize("text", ORDERS)
@pytest.mark.parametrize("variant", variants(backend="cpu"), ids=str)
def test_decoding_after_a_prefill_is_the_whole_prefill(folder: Path, variant: Variant, text: str) -> None:
    """Instances that shared keys and values, the mistake of llama.cpp #4718, would differ from the second call on."""
    model = variant.load(folder, layer_order=text)
    cache = model.new_cache()
    rows = [model.forward(IDS[:25], cache, logits="all")]
    rows += [model.forward([token_id], cache) for token_id in IDS[25:]]
    assert torch.equal(torch.cat(rows), run(model))


def test_repeats_cost_cache_and_no_weights(folder: Path) -> None:
    model = load_model(folder, backend="reference")
    weights, pointers = model.weight_bytes, [id(layer) for layer in model.weights.layers]
    before = model.new_cache()
    model.forward(IDS, before, logits="none")
    model.set_layer_order("0-3,0-3")
    assert model.weight_bytes == weights and [id(layer) for layer in model.weights.layers] == pointers
    after = model.new_cache()
    model.forward(IDS, after, logits="none")
    assert after.num_bytes == 2 * before.num_bytes == model.cache_bytes(len(IDS))


def test_a_cache_is_refused_under_another_order_and_taken_under_its_own(folder: Path) -> None:
    model = CORE.load(folder)
    cache = model.new_cache()
    before = model.forward(IDS[:5], cache)
    model.set_layer_order("0-3,0-3")
    for call in (lambda: model.forward([1], cache), lambda: model.reusable_prefix(cache, IDS)):
        with pytest.raises(
            RequestError, match="made for the layer order '0-3', the model now has '0-3,0-3'.*new_cache"
        ):
            call()
    assert cache.length == 5
    model.set_layer_order()
    cache.truncate(4)
    assert torch.equal(model.forward(IDS[4:5], cache), before)


def test_a_refused_order_leaves_the_model_as_it_was(folder: Path) -> None:
    model = CORE.load(folder, layer_order="0-3,2-3")
    cache = model.new_cache()
    model.forward(IDS[:5], cache)
    for arguments in (("0-4",), ("b:0",), ([],), ("0-3", 2, 1), (None, 2, 2), ("1@nan",)):
        with pytest.raises(ConfigError):
            model.set_layer_order(*arguments)
    assert str(model.layer_order) == "0-3,2-3" and len(model.instances) == 6
    assert torch.equal(model.forward(IDS[5:6], cache), run(model, IDS[:6])[-1:])


def test_config_json_can_hold_the_order(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"layer_order": [0, 1, 1]}, dense=True)
    model = reference(tmp_path)
    assert str(model.layer_order) == "0,1*2"
    model.set_layer_order("0-1")
    model.set_layer_order()
    assert str(model.layer_order) == "0,1*2"


@pytest.mark.parametrize(
    "overrides, options, message",
    [
        ({"intermediate_size": 64}, {}, "intermediate_size 64, not 96"),
        ({"num_key_value_heads": 4}, {}, "num_kv_heads 4, not 2"),
        ({"rms_norm_eps": 1e-6}, {}, "norm_eps"),
        ({}, {"family": "qwen2"}, "family 'qwen2', not 'llama'"),
    ],
)
def test_a_second_model_of_other_shapes_is_refused(folder: Path, tmp_path: Path, overrides, options, message) -> None:
    write_checkpoint(tmp_path, overrides, dense=True, **options)
    with pytest.raises(ConfigError, match=message):
        reference(folder, second_folder=tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        reference(folder, second_folder=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="second_folder must be a path, got 7"):
        reference(folder, second_folder=7)


def test_another_rope_of_the_second_model_is_warned_about(folder: Path, tmp_path: Path, caplog) -> None:
    write_checkpoint(tmp_path, {"rope_theta": 1e6}, dense=True)
    reference(folder, second_folder=tmp_path)
    assert "made for another RoPE" in caplog.text


def test_progress_counts_the_layers_of_both_models(folder: Path, other) -> None:
    seen = []
    reference(folder, second_folder=other[0], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 10) for step in range(1, 11)]


def test_the_engine_takes_a_new_cache_when_the_order_changes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"vocab_size": 400})
    write_sentencepiece(tmp_path)
    params, prompt = SamplingParams(max_new_tokens=6, temperature=0.0), [5, 6, 7, 8]
    engine = Engine(reference(tmp_path, max_seq_len=64), load_tokenizer(tmp_path))
    plain = engine.generate(prompt, params)
    engine.model.set_layer_order("0-1,0-1")
    repeated = engine.generate(prompt, params)
    assert repeated.stats.reused_tokens == 0 and engine.context_size == 64
    fresh = Engine(reference(tmp_path, max_seq_len=64, layer_order="0-1,0-1"), load_tokenizer(tmp_path))
    assert repeated.token_ids == fresh.generate(prompt, params).token_ids
    engine.model.set_layer_order("0-1")
    assert engine.generate(prompt, params).token_ids == plain.token_ids


def test_a_stream_whose_order_is_changed_ends_in_an_error_and_frees_the_engine(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"vocab_size": 400})
    write_sentencepiece(tmp_path)
    engine = Engine(reference(tmp_path, max_seq_len=64), load_tokenizer(tmp_path))
    params = SamplingParams(max_new_tokens=30, temperature=0.0, ignore_eos=True)
    stream = engine.stream([5, 6, 7], params)
    next(stream)
    engine.model.set_layer_order("0-1,1")
    with pytest.raises(RequestError, match="made for the layer order '0-1'"):
        list(stream)
    assert len(engine.generate([5, 6, 7], params).token_ids) == 30


def test_info_shows_the_order_the_instances_and_the_memory(folder: Path, other) -> None:
    plain = model_info(folder)
    info = model_info(folder, recompute_n_layers=3, rewind_n_layers=2)
    assert (info.layer_order, info.num_layers, info.num_instances) == ("0-2,1-3", 4, 6)
    assert info.weight_bytes == plain.weight_bytes
    assert {n: 2 * size for n, size in info.cache_bytes.items()} == {n: 3 * s for n, s in plain.cache_bytes.items()}
    assert "0-2,1-3: 6 layer instances" in info.describe() and "1.50 times" in info.describe()
    assert "0-3: 4 layer instances" in plain.describe()
    mixed = model_info(folder, layer_order="0,b:4", second_folder=other[0])
    layer = sum(t.numel() for name, t in other[1].items() if name.startswith("model.layers.0."))
    assert mixed.weight_bytes == plain.weight_bytes + 2 * layer * (NUM_LAYERS + 1)
    assert json.loads(json.dumps(mixed.to_json()))["layer_order"] == "0,b:4"
