"""Layer orders: how they are written, printed and chosen, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_writer import model_config
from ropewalk.base.errors import ConfigError
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


def layers(text: str, num_layers: int = 32) -> list[int]:
    return [use.layer for use in parse_layer_order(text, num_layers).uses]


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
