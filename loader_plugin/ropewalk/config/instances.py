"""Layer instances: the steps of a running decoder.

Several instances can run the same weights; each has keys and values of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ropewalk.config.layer_order import LayerOrder


@dataclass(frozen=True, slots=True)
class LayerInstance:
    """One step of the decoder: the weights that it runs, its own keys and values, and its weight in the sum."""

    weights_index: int
    cache_index: int
    residual_weight: float = 1.0


def instances_of(order: LayerOrder, num_layers: int) -> tuple[LayerInstance, ...]:
    """The instances that an order asks for, each with keys and values of its own.

    num_layers: of the first model; the layers of the second follow them in `ModelWeights.layers`.
    """
    return tuple(
        LayerInstance(use.layer + (num_layers if use.source == "b" else 0), position, use.weight)
        for position, use in enumerate(order.uses)
    )
