"""The layers tab: an order as a list of bars, what it costs, and the same prompt before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.base.memory import format_bytes
from ropewalk.config.layer_order import LayerOrder, choose_layer_order, plain_order, rewinding_order
from ropewalk.engine.engine import Engine
from ropewalk.generate.sampling import SamplingParams
from ropewalk.gradio_demo.model_bar.owner import Owner
from ropewalk.gradio_demo.model_bar.workbench import Loaded, Workbench
from ropewalk.gradio_demo.replies.measuring import Measurement
from ropewalk.gradio_demo.replies.running import Running
from ropewalk.gradio_demo.shared.visitors import Visitor
from ropewalk.model.variants import variant_model

MAX_COMPARED_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Bar:
    """One layer instance. second: its weights are the second model's; weight: how much of its change counts."""

    layer: int
    second: bool
    weight: float
    repeated: bool


@dataclass(frozen=True, slots=True)
class OrderView:
    """An order before it is applied. num_layers: of the model; cost: memory in words; error: what is wrong with it."""

    canonical: str = ""
    bars: tuple[Bar, ...] = ()
    num_layers: int = 0
    cost: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two continuations of one prompt; `error` says why there are none."""

    before: str = ""
    after: str = ""
    line: str = ""
    running: bool = False
    error: str | None = None


class LayerLab:
    """Orders of the loaded model. Applying one changes the model for everybody; comparing changes nothing."""

    def __init__(self, workbench: Workbench, running: Running, owner: Owner) -> None:
        self._workbench = workbench
        self._running = running
        self._owner = owner

    def current(self) -> str:
        """The order that the model runs."""
        loaded = self._workbench.loaded
        return "" if loaded is None else str(loaded.model.layer_order)

    def rewind(self, recompute: float | None, rewind: float | None) -> str:
        """The order that runs some layers, goes back by some, and so on.

        Raises:
            ConfigError: the numbers do not fit the model. RequestError: no model is loaded.
        """
        config = self._workbench.require().model.config
        order = rewinding_order(int(recompute or 0), int(rewind or 0), config.num_layers, None)
        return str(order)

    def view(self, text: str) -> OrderView:
        """What an order means; an empty text is the order of the files."""
        try:
            loaded = self._workbench.require()
            order = _parse(loaded, text)
        except RopewalkError as error:
            return OrderView(error=str(error))
        return OrderView(str(order), _bars(order), loaded.model.config.num_layers, _cost(loaded, order))

    def apply(self, visitor: Visitor, text: str) -> OrderView:
        """Run the model in this order from now on, if the visitor may change it. Waits for running replies to end; an
        invalid order changes nothing."""
        try:
            self._owner.require(visitor)
            loaded = self._workbench.require()
            order = _parse(loaded, text)
            self._workbench.set_layer_order(order)
        except RopewalkError as error:
            return OrderView(error=str(error))
        return self.view(text)

    def compare(self, visitor: Visitor, text: str, prompt: str, params: SamplingParams) -> Iterator[Pair]:
        """The same prompt and seed under the current order and under another one, which is not applied."""
        texts = ["", ""]

        def work(progress, cancelled) -> bool:
            loaded = self._workbench.require()
            if not prompt:
                raise RequestError("write a prompt first: both orders continue it")
            for number, order in enumerate((loaded.model.layer_order, _parse(loaded, text))):
                for piece in _stream(loaded, order, prompt, params, cancelled):
                    texts[number] += piece
            return True

        measurement = Measurement(work)
        try:
            with self._running.hold(visitor.tab, measurement):
                for measured in measurement.follow():
                    line = "writing" if measured.running else measured.error or "done"
                    yield Pair(*texts, line, measured.running, measured.error)
        except RopewalkError as error:
            yield Pair(line=str(error), error=str(error))


def _parse(loaded: Loaded, text: str) -> LayerOrder:
    """Raises ConfigError, which points at the mistake."""
    model = loaded.model
    if not text.strip():
        return plain_order(model.config.num_layers)
    second_layers = len(model.weights.layers) - model.config.num_layers or None
    return choose_layer_order(model.config, text.strip(), second_layers=second_layers)


def _bars(order: LayerOrder) -> tuple[Bar, ...]:
    seen: set[tuple[str, int]] = set()
    bars = []
    for use in order.uses:
        bars.append(Bar(use.layer, use.source == "b", use.weight, (use.source, use.layer) in seen))
        seen.add((use.source, use.layer))
    return tuple(bars)


def _cost(loaded: Loaded, order: LayerOrder) -> str:
    model = loaded.model
    each = model.cache_bytes(model.max_seq_len) // len(model.instances)
    times = len(order) / model.config.num_layers
    return (
        f"{len(order)} layer instances: the weights stay {format_bytes(model.weight_bytes)}, a full cache takes "
        f"{format_bytes(each * len(order))}, {times:.2f} times that of the {model.config.num_layers} layers"
    )


def _stream(loaded: Loaded, order: LayerOrder, prompt: str, params: SamplingParams, cancelled) -> Sequence[str]:
    """Pieces of a continuation in an order, on a variant of the model, so that the page's model stays as it is."""
    length = min(loaded.model.max_seq_len, MAX_COMPARED_CONTEXT)
    model = variant_model(loaded.model, max_seq_len=length, layer_order=order)
    return Engine(model, loaded.tokenizer).stream(prompt, params, cancelled)
