"""How much a token has to compute and to read: weights that it is multiplied with, keys that it meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ropewalk.config.instances import LayerInstance
from ropewalk.config.model import ModelConfig
from ropewalk.model.layers import CopiedLayer, PackedLayer

# Operations of attention take about this many times as long as those of weights: float products beside integer ones
# (1.1B on two AVX-512 cores, steps of 8 to 48 rows after up to 16,384 tokens: 3.4 to 3.6).
KEY_COST = 3.5


@dataclass(frozen=True, slots=True)
class TokenWork:
    """Operations of a token in the layers, without the head: a multiplication and an addition are two.

    weights: with weights. key: with one key and its value, in one layer. windows: the most keys of each layer.
    """

    weights: int
    key: int
    windows: tuple[int | None, ...]

    def operations(self, keys: float) -> float:
        """Of a token with so many keys before it."""
        return self.weights + self._attention(keys)

    def beside_first(self, keys: float) -> float:
        """How long a token with so many keys before it takes, where one with none takes 1."""
        return 1 + KEY_COST * self._attention(keys) / self.weights

    def _attention(self, keys: float) -> float:
        return self.key * sum(keys if window is None else min(keys, window) for window in self.windows)


def token_work(config: ModelConfig, instances: Sequence[LayerInstance]) -> TokenWork:
    """That of a model whose layers run in this order, wherever their weights are."""
    run = [instance.weights_index % config.num_layers for instance in instances]
    weights = sum(_linear_weights(config, index) for index in run)
    windows = tuple(config.sliding_windows[index] for index in run)
    return TokenWork(2 * weights, 4 * config.num_heads * config.head_dim, windows)


def _linear_weights(config: ModelConfig, index: int) -> int:
    """How many weights of decoder layer `index` a token is multiplied with."""
    kind, sizes, mixture = config.layer_table(index), config.sizes, config.mixture
    chosen = 0 if kind.experts is None else 3 * config.hidden_size * mixture.inner * mixture.top_k
    return chosen + sum(sizes[entry.inputs] * sizes[entry.outputs] for entry in kind.linears)


def met_bytes(config: ModelConfig, layers: Sequence[PackedLayer | CopiedLayer]) -> tuple[int, int]:
    """Bytes of layers that a token reads: of the experts that are chosen for it, and of everything else."""
    once = [_once(layer) for layer in layers]
    mixture = config.mixture
    experts = sum(held.num_bytes for layer in once for held in layer.experts.values())
    chosen = 0 if mixture is None else experts * mixture.top_k // mixture.num_experts
    return chosen, sum(layer.num_bytes for layer in once) - experts


def _once(layer: PackedLayer | CopiedLayer) -> PackedLayer:
    return layer.copies[0] if isinstance(layer, CopiedLayer) else layer
