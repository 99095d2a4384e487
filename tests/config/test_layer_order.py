"""Layer orders: how they are written and printed, and that a model runs what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from gptq_writer import model_config, write_checkpoint
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.config.layer_order import (
    MAX_INSTANCES,
    LayerOrder,
    LayerUse,
    checked_layer_order,
    choose_layer_order,
    parse_layer_order,
    plain_order,
    rewinding_order,
)
from ropewalk.config.model import parse_model_config
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


def layers(text: str, num_layers: int = 32) -> list[int]:
    return [use.layer for use in parse_layer_order(text, num_layers).uses]


# Spelling


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0-15,8-23,16-31", [*range(16), *range(8, 24), *range(16, 32)]),
        (" 0 - 2 ,\n 5", [0, 1, 2, 5]),
        ("[0,1,2,2,3]", [0, 1, 2, 2, 3]),
        ("[ 31 ]", [31]),
        ("3*2,1-1", [3, 3, 1]),
        ("007", [7]),
        ("2,1,0", [2, 1, 0]),
    ],
)
def test_orders_are_read(text: str, expected: list[int]) -> None:
    assert layers(text) == expected


def test_weights_and_models_are_read() -> None:
    weighted = parse_layer_order("0-9,10*4@0.25,11-31", 32)
    assert len(weighted) == 35
    assert weighted.uses[10:14] == (LayerUse(10, "a", 0.25),) * 4
    assert {use.weight for use in weighted.uses[:10] + weighted.uses[14:]} == {1.0}
    mixed = parse_layer_order("a:0-1,b:3@-.5e0, 2", 4, 5)
    assert mixed.uses == (LayerUse(0), LayerUse(1), LayerUse(3, "b", -0.5), LayerUse(2))
    assert mixed.uses_second and not weighted.uses_second


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("a:0-19, b:10-29", "0-19,b:10-29"),
        ("[0,1,2,2,3]", "0-1,2*2,3"),
        ("10@.25,10@0.250,11@1", "10*2@0.25,11"),
        ("0,1,2,3@2.0", "0-2,3@2"),
        ("0-15,8-23,16-31", "0-15,8-23,16-31"),
        ("5,4,3", "5,4,3"),
    ],
)
def test_orders_are_printed_in_one_spelling(text: str, canonical: str) -> None:
    assert str(parse_layer_order(text, 32, 32)) == canonical


WEIGHTS = st.one_of(st.just(1.0), st.floats(1e-3, 100.0), st.floats(-100.0, -1e-3))
USES = st.builds(LayerUse, st.integers(0, 5), st.sampled_from("ab"), WEIGHTS)
RUNNING = st.builds(LayerUse, st.integers(0, 5), st.just("a"), st.sampled_from([1.0, 0.25]))


@given(st.lists(USES | RUNNING, min_size=1, max_size=40))
def test_what_is_printed_reads_as_it_was(uses: list[LayerUse]) -> None:
    order = LayerOrder(tuple(uses))
    again = parse_layer_order(str(order), 6, 6)
    assert again == order and str(again) == str(order)


@pytest.mark.parametrize(
    "text, column, message",
    [
        ("", 1, "a layer number is needed"),
        ("   ", 4, "a layer number is needed"),
        ("[]", 2, "a layer number is needed"),
        ("0-3,", 5, "a layer number is needed"),
        ("0,,1", 3, "a layer number is needed"),
        ("0-3,x", 5, "a layer number is needed"),
        ("0-", 3, "a layer number is needed"),
        ("-1", 1, "a layer number is needed"),
        ("0-3;4", 4, "a comma is needed"),
        ("0 1", 3, "a comma is needed"),
        ("0-32", 3, "from 0 to 31"),
        ("7,99999999999999999999999999", 3, "from 0 to 31"),
        ("3-1", 3, "a range counts up: 1 comes before 3"),
        ("1*0", 3, "repeated 1 to 4096 times"),
        ("1*9999999999999", 3, "repeated 1 to 4096 times"),
        ("1*", 3, "how often"),
        ("0-3*2", 4, "only a single layer"),
        ("1@", 3, "the weight"),
        ("1@nan", 3, "the weight"),
        ("1@inf", 3, "the weight"),
        ("1@1e999", 3, "from 0.001 to 100"),
        ("1@0", 3, "from 0.001 to 100"),
        ("1@0.5.5", 6, "a comma is needed"),
        ("b:1", 1, "no second model"),
        ("a1", 2, "a colon is needed"),
        ("c:1", 1, "a layer number is needed"),
        ("[0,1", 5, "closing bracket"),
        ("[0,1],2", 6, "nothing may follow"),
        ("[0-3]", 3, "closing bracket"),
        ("٣", 1, "a layer number is needed"),
        ("0," * 9 + "1*4096", 19, "more than 4096 layers"),
    ],
)
def test_a_mistake_is_pointed_at(text: str, column: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_layer_order(text, 32)
    first, line, caret = str(caught.value).split("\n")
    assert first.startswith("layer_order: ") and f"at column {column}," in first and "0-15,8-23,16-31" in first
    assert caret.index("^") == len(caret) - 1
    shown = line[caret.index("^") : caret.index("^") + 1]
    meant = text[column - 1 : column]
    assert shown == (meant if meant.isascii() else "?")


def test_the_caret_stands_below_the_mistake_in_a_long_order() -> None:
    text = "1," * 100 + "?" + ",1" * 100
    with pytest.raises(ConfigError, match="column 201") as caught:
        parse_layer_order(text, 32)
    _, line, caret = str(caught.value).split("\n")
    assert line[caret.index("^")] == "?" and len(line) < 80


@given(st.text(alphabet="0123456789,-*@.abe:[] \n٣+x", max_size=30))
def test_any_text_is_an_order_or_a_config_error(text: str) -> None:
    try:
        order = parse_layer_order(text, 6, 6)
    except ConfigError:
        return
    assert parse_layer_order(str(order), 6, 6) == order


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "1 to 4096 layers, got 0"),
        ([0] * (MAX_INSTANCES + 1), "got 4097"),
        ([0, 4], r"layer_order\[1\] must be a layer number from 0 to 3, got 4"),
        ([-1], r"\[0\]"),
        ([True], "got True"),
        ([1.0], "got 1.0"),
        ([None], "got None"),
        (["0"], "got '0'"),
        ({"0": 1}, "must be text or a list"),
        (7, "must be text or a list"),
        (LayerOrder(()), "a layer number is needed"),
        (LayerOrder((LayerUse(9),)), "from 0 to 3"),
        (LayerOrder((LayerUse(0, "b"),)), "no second model"),
        (LayerOrder((LayerUse(0, "c"),)), "a layer number is needed"),
        (LayerOrder((LayerUse(0, "a", float("nan")),)), "the weight"),
        ("0," * 40000, "80000 characters, at most 65536"),
    ],
)
def test_orders_of_other_kinds_are_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_layer_order(value, 4)


@pytest.mark.parametrize(
    "recompute, rewind, num_layers, expected",
    [
        (16, 8, 32, "0-15,8-23,16-31"),
        (16, 8, 80, "0-15,8-23,16-31,24-39,32-47,40-55,48-63,56-71,64-79"),
        (16, 8, 30, "0-15,8-23,16-29"),  # the last block ends with the model
        (16, 0, 32, "0-31"),
        (40, 8, 32, "0-31"),
        (3, 1, 5, "0-1,2*2,3-4"),
    ],
)
def test_recomputing_and_rewinding_is_the_pattern_of_goliath(recompute, rewind, num_layers, expected) -> None:
    assert str(rewinding_order(recompute, rewind, num_layers)) == expected


def test_with_two_models_every_recomputed_block_is_of_the_other() -> None:
    assert str(rewinding_order(16, 8, 32, 32)) == "0-15,b:8-23,16-31"
    with pytest.raises(ConfigError, match="32 and 30"):
        rewinding_order(16, 8, 32, 30)


@pytest.mark.parametrize(
    "recompute, rewind, message",
    [
        (8, 8, "would never end"),
        (4, 9, "would never end"),
        (4, -1, "would never end"),
        (0, 0, "would never end"),
        (None, 4, "recompute_n_layers must be an integer, got None: the two"),
        (4, None, "rewind_n_layers must be an integer"),
        (True, 0, "must be an integer"),
        (4.0, 2, "must be an integer"),
        (4000, 3999, "more than 4096 layers"),
    ],
)
def test_impossible_patterns_are_refused(recompute, rewind, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rewinding_order(recompute, rewind, 4096)


def test_arguments_come_before_config_json_and_exclude_each_other() -> None:
    config = parse_model_config(model_config("llama", {"layer_order": "0,0,1"}), "config.json")
    assert str(choose_layer_order(config)) == "0*2,1"
    assert str(choose_layer_order(config, "1,0")) == "1,0"
    assert str(choose_layer_order(config, [1, 0])) == "1,0"
    assert str(choose_layer_order(config, plain_order(2))) == "0-1"
    assert str(choose_layer_order(config, None, 2, 1)) == "0-1"
    with pytest.raises(ConfigError, match="not both"):
        choose_layer_order(config, "0", 2, 1)
    for declared in ("0-2", {"layers": [0]}):
        wrong = parse_model_config(model_config("llama", {"layer_order": declared}), "config.json")
        with pytest.raises(ConfigError, match="^config.json: layer_order"):
            choose_layer_order(wrong)


# Running


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
    single = model.new_cache().num_bytes
    model.set_layer_order("0-3,0-3")
    assert model.weight_bytes == weights and [id(layer) for layer in model.weights.layers] == pointers
    assert model.new_cache().num_bytes == 2 * single == model.cache_bytes(model.max_seq_len)


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
        ({"rms_norm_eps": 1e-6}, {}, "rms_norm_eps"),
        ({}, {"family": "qwen2"}, "family 'qwen2', not 'llama'"),
    ],
)
def test_a_second_model_of_other_shapes_is_refused(folder: Path, tmp_path: Path, overrides, options, message) -> None:
    write_checkpoint(tmp_path, overrides, dense=True, **options)
    with pytest.raises(ConfigError, match=message):
        reference(folder, second_folder=tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        reference(folder, second_folder=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="must be a path, got int"):
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


# What is said about it


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
