"""Which layers a model runs, in which order, how often, and with what weight each adds its change.

    order = term {"," term}      term = ["a:" | "b:"] layer ["-" layer | "*" times] ["@" weight]

    0-15,8-23,16-31        layers 8 to 23 twice, as in self-merges of the Goliath kind
    0-9,10*4@0.25,11-31    layer 10 four times, with a quarter of its change each
    a:0-19,b:10-29         layers of two models of equal shapes
    [0,1,2,2,3]            the spelling of llama.cpp #4718

However an order is written, it becomes a `LayerOrder`, which prints itself in one canonical spelling:
`parse_layer_order(str(order), ...) == order`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from ropewalk.base.errors import ConfigError
from ropewalk.base.json import shown
from ropewalk.base.limits import MAX_LAYERS
from ropewalk.base.notation import TextCursor, plain_number
from ropewalk.config.model import ModelConfig

SOURCES = ("a", "b")
MAX_INSTANCES = MAX_LAYERS  # so that an exported order can be loaded as a model
MAX_TEXT = 2**16  # 4096 layers, each with a weight of 15 digits
# Limits of the absolute residual weight: far beyond what is useful, and products stay in the range of float16.
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e2
EXAMPLES = '"0-15,8-23,16-31", "0-9,10*4@0.25,11-31" or [0, 1, 2, 2, 3]'


@dataclass(frozen=True, slots=True)
class LayerUse:
    """One use of a layer: its number, its model ("a", or "b" for the second), and its weight in the residual sum."""

    layer: int
    source: str = "a"
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """The uses of layers, from the embeddings to the head. Made by the functions below, which check it."""

    uses: tuple[LayerUse, ...]

    def __len__(self) -> int:
        return len(self.uses)

    def __str__(self) -> str:
        """The canonical spelling: ascending runs as ranges, a layer repeated at once with "*"."""
        terms, position = [], 0
        while position < len(self.uses):
            times = self._same_from(position)
            length = 1 if times > 1 else self._run_from(position)
            terms.append(_term(self.uses[position], length, times))
            position += max(length, times)
        return ",".join(terms)

    @property
    def uses_second(self) -> bool:
        """True if a layer of the second model is among them."""
        return any(use.source == "b" for use in self.uses)

    def is_plain(self, num_layers: int) -> bool:
        """True if this is every layer of one model once, in its place, unweighted."""
        return self == plain_order(num_layers)

    def _same_from(self, position: int) -> int:
        """How many uses from `position` on are equal."""
        end = position + 1
        while end < len(self.uses) and self.uses[end] == self.uses[position]:
            end += 1
        return end - position

    def _run_from(self, position: int) -> int:
        """How many uses from `position` on count up by one. A run ends before a layer that is repeated."""
        end, first = position + 1, self.uses[position]
        while (
            end < len(self.uses)
            and self.uses[end] == LayerUse(first.layer + end - position, first.source, first.weight)
            and self._same_from(end) == 1
        ):
            end += 1
        return end - position


def plain_order(num_layers: int) -> LayerOrder:
    """Every layer once, as the model was trained."""
    return LayerOrder(tuple(LayerUse(layer) for layer in range(num_layers)))


def choose_layer_order(
    config: ModelConfig,
    layer_order: str | Sequence[int] | LayerOrder | None = None,
    recompute_n_layers: int | None = None,
    rewind_n_layers: int | None = None,
    second_layers: int | None = None,
) -> LayerOrder:
    """The order that the arguments of `load_model` give, else the key `layer_order` of config.json, else the plain one.

    second_layers: the number of layers of the second model; None: there is none.

    Raises:
        ConfigError: arguments that exclude each other, or as `checked_layer_order` and `rewinding_order`.
    """
    if recompute_n_layers is not None or rewind_n_layers is not None:
        if layer_order is not None:
            raise ConfigError("give either layer_order or recompute_n_layers with rewind_n_layers, not both")
        return rewinding_order(recompute_n_layers, rewind_n_layers, config.num_layers, second_layers)
    if layer_order is not None:
        return checked_layer_order(layer_order, config.num_layers, second_layers)
    declared = config.raw.get("layer_order")
    if declared is not None:
        return checked_layer_order(declared, config.num_layers, second_layers, f"{config.source}: layer_order")
    return plain_order(config.num_layers)


def checked_layer_order(
    value: str | Sequence[int] | LayerOrder,
    num_layers: int,
    second_layers: int | None = None,
    name: str = "layer_order",
) -> LayerOrder:
    """An order however it was given: as text, as a list of layer numbers, or as a LayerOrder.

    Raises:
        ConfigError: a value of another type, an empty or too long order, or a layer that does not exist.
    """
    if isinstance(value, str):
        return parse_layer_order(value, num_layers, second_layers, name)
    if isinstance(value, LayerOrder):
        return parse_layer_order(str(value), num_layers, second_layers, name)
    if not isinstance(value, (list, tuple, range)):
        raise ConfigError(f"{name} must be text or a list of layer numbers such as {EXAMPLES}, got {shown(value)}")
    if not 0 < len(value) <= MAX_INSTANCES:
        raise ConfigError(f"{name} must have 1 to {MAX_INSTANCES} layers, got {len(value)}")
    for position, layer in enumerate(value):
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < num_layers:
            raise ConfigError(
                f"{name}[{position}] must be a layer number from 0 to {num_layers - 1}, got {shown(layer)}"
            )
    return LayerOrder(tuple(LayerUse(int(layer)) for layer in value))


def rewinding_order(
    recompute_n_layers: object, rewind_n_layers: object, num_layers: int, second_layers: int | None = None
) -> LayerOrder:
    """Run `recompute_n_layers` layers, go back by `rewind_n_layers`, and so on to the last layer (llama.cpp #4718).

    16 and 8 of 32 layers: 0-15,8-23,16-31. The last block ends with the model, so it can be shorter. With a second
    model the blocks alternate between the two, which is Goliath's own recipe.

    Raises:
        ConfigError: not integers with 0 <= rewind_n_layers < recompute_n_layers, or more than MAX_INSTANCES layers.
    """
    for name, value in (("recompute_n_layers", recompute_n_layers), ("rewind_n_layers", rewind_n_layers)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ConfigError(f"{name} must be an integer, got {shown(value)}: the two options go together")
    if not 0 <= rewind_n_layers < recompute_n_layers:
        raise ConfigError(
            f"rewind_n_layers must be from 0 to recompute_n_layers - 1, got {shown(rewind_n_layers)} and "
            f"recompute_n_layers {shown(recompute_n_layers)}: going back by more than was run would never end"
        )
    if second_layers is not None and second_layers != num_layers:
        raise ConfigError(
            f"recompute_n_layers alternates between two models of equally many layers, these have {num_layers} and "
            f"{second_layers}: write the order out, such as a:0-19,b:10-29"
        )
    uses: list[LayerUse] = []
    start, block = 0, 0
    while True:
        end = min(start + recompute_n_layers, num_layers)
        source = SOURCES[block % 2] if second_layers is not None else "a"
        uses += [LayerUse(layer, source) for layer in range(start, end)]
        if len(uses) > MAX_INSTANCES:
            raise ConfigError(f"recompute_n_layers and rewind_n_layers give more than {MAX_INSTANCES} layers")
        if end == num_layers:
            return LayerOrder(tuple(uses))
        start, block = int(end - rewind_n_layers), block + 1


def parse_layer_order(
    text: str, num_layers: int, second_layers: int | None = None, name: str = "layer_order"
) -> LayerOrder:
    """The order that a text spells; see the top of this module.

    Raises:
        ConfigError: points at the character and says what is accepted there.
    """
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{name} has {len(text)} characters, at most {MAX_TEXT} are accepted")
    return _Parser(text, num_layers, second_layers, name).order()


class _Parser:
    """Reads one order from left to right."""

    def __init__(self, text: str, num_layers: int, second_layers: int | None, name: str) -> None:
        self._cursor = TextCursor(text, name, ConfigError, f"orders such as {EXAMPLES}")
        self._num_layers = {"a": num_layers, "b": second_layers}
        self._uses: list[LayerUse] = []

    def order(self) -> LayerOrder:
        cursor = self._cursor
        bracket = cursor.accepts("[")
        while True:
            self._layer_of_list() if bracket else self._term()
            if not cursor.accepts(","):
                break
        if bracket and not cursor.accepts("]"):
            cursor.fail(cursor.position, "a comma or the closing bracket is needed")
        if not cursor.at_end:
            cursor.fail(cursor.position, "a comma is needed" if not bracket else "nothing may follow the bracket")
        return LayerOrder(tuple(self._uses))

    def _layer_of_list(self) -> None:
        at, layer = self._layer("a")
        self._add([LayerUse(layer)], at)

    def _term(self) -> None:
        cursor, source = self._cursor, self._source()
        at, first = self._layer(source)
        last, times = first, 1
        if cursor.accepts("-"):
            last_at, last = self._layer(source)
            if last < first:
                cursor.fail(last_at, f"a range counts up: {last} comes before {first}; list the layers one by one")
        if cursor.accepts("*"):
            if last != first:
                cursor.fail(
                    cursor.position - 1, 'only a single layer can be repeated with "*": repeat the range itself'
                )
            times_at, times = cursor.integer("how often, a number")
            if not 1 <= times <= MAX_INSTANCES:
                cursor.fail(times_at, f"a layer can be repeated 1 to {MAX_INSTANCES} times")
        weight = self._weight() if cursor.accepts("@") else 1.0
        self._add([LayerUse(layer, source, weight) for layer in range(first, last + 1) for _ in range(times)], at)

    def _add(self, uses: list[LayerUse], at: int) -> None:
        self._uses += uses
        if len(self._uses) > MAX_INSTANCES:
            self._cursor.fail(at, f"from here on there are more than {MAX_INSTANCES} layers")

    def _source(self) -> str:
        cursor = self._cursor
        cursor.skip_space()
        at = cursor.position
        for source in SOURCES:
            if cursor.accepts(source):
                if not cursor.accepts(":"):
                    cursor.fail(cursor.position, f'a colon is needed, as in "{source}:0-19"')
                if self._num_layers[source] is None:
                    cursor.fail(at, "there is no second model: give its folder (second_folder)")
                return source
        return "a"

    def _layer(self, source: str) -> tuple[int, int]:
        at, layer = self._cursor.integer("a layer number")
        count = self._num_layers[source]
        if layer >= count:
            self._cursor.fail(at, f"layer numbers of this model go from 0 to {count - 1}")
        return at, layer

    def _weight(self) -> float:
        at, weight = self._cursor.decimal("the weight, a number such as 0.25, is needed")
        if not math.isfinite(weight) or not MIN_WEIGHT <= abs(weight) <= MAX_WEIGHT:
            self._cursor.fail(at, f"a weight must be from {MIN_WEIGHT:g} to {MAX_WEIGHT:g} (or the same below zero)")
        return weight


def _term(use: LayerUse, length: int, times: int) -> str:
    prefix = "" if use.source == "a" else f"{use.source}:"
    last = f"-{use.layer + length - 1}" if length > 1 else ""
    repeated = f"*{times}" if times > 1 else ""
    weight = "" if use.weight == 1.0 else f"@{plain_number(use.weight)}"
    return f"{prefix}{use.layer}{last}{repeated}{weight}"
