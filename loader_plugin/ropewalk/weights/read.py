"""A model's weights from a checkpoint: embeddings, decoder layers one by one, and the head.

The names and sizes are data (families/), and weights/check.py has checked them before anything here runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ropewalk.config.model import ModelConfig
from ropewalk.config.settings import QuantConfig
from ropewalk.containers.choice import container_of
from ropewalk.families import FAMILIES
from ropewalk.families.family import EMBEDDINGS, FINAL_NORM, HEAD, layer_prefix
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import DenseLinear, GptqLinear, read_bias, require_finite
from ropewalk.weights.check import check_tensors, settings_of

__all__ = ["LayerWeights", "check_tensors", "read_embeddings", "read_head", "read_layer"]

Linear = GptqLinear | DenseLinear


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer. C = hidden size, D = head size."""

    attn_norm: torch.Tensor  # [C] float32
    mlp_norm: torch.Tensor  # [C] float32
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    q_norm: torch.Tensor | None = None  # [D] float32
    k_norm: torch.Tensor | None = None  # [D] float32


def read_embeddings(config: ModelConfig, checkpoint: Checkpoint) -> torch.Tensor:
    """The embedding table [V, C] as stored. A tied model may store it as lm_head.weight only."""
    if config.tie_word_embeddings and EMBEDDINGS not in checkpoint:
        return checkpoint.tensor(f"{HEAD}.weight")
    return checkpoint.tensor(EMBEDDINGS)


def read_layer(config: ModelConfig, quant: QuantConfig | None, checkpoint: Checkpoint, index: int) -> LayerWeights:
    """Layer `index`, read from the files.

    Raises:
        CheckpointError: a norm, scale or bias that is not finite, a g_idx out of range.
    """
    size, table, prefix = config.sizes, FAMILIES[config.family], layer_prefix(index)
    norms = {norm.field: _read_norm(checkpoint, f"{prefix}{norm.name}.weight") for norm in table.norms}
    linears = {}
    for entry in table.linears:
        name = prefix + entry.name
        linear = _read_linear(quant, checkpoint, name, size[entry.inputs], size[entry.outputs])
        if linear.bias is not None and not getattr(config, entry.bias):
            checkpoint.warn_once(
                "undeclared bias",
                f"{name}.bias is not zero although {config.source} declares no bias there: it is used",
            )
        linears[entry.field] = linear
    return LayerWeights(**norms, **linears)


def read_head(
    config: ModelConfig, quant: QuantConfig | None, checkpoint: Checkpoint, embeddings: torch.Tensor
) -> tuple[torch.Tensor, Linear]:
    """(final norm [C] float32, lm_head [C -> V]). A tied head shares the tensor `embeddings`.

    A tied model whose file holds a different lm_head uses that one, as transformers 5 does.
    """
    final_norm = _read_norm(checkpoint, FINAL_NORM)
    stored = f"{HEAD}.weight"
    if config.tie_word_embeddings and not container_of(quant).holds(checkpoint, HEAD):
        if stored not in checkpoint or checkpoint.holds(stored, embeddings):
            return final_norm, DenseLinear(HEAD, embeddings, read_bias(checkpoint, HEAD))
        checkpoint.warn_once(
            "tied head differs",
            f"{config.source} ties lm_head to the embeddings, but {stored} differs from them: it is used as stored",
        )
    return final_norm, _read_linear(quant, checkpoint, HEAD, config.hidden_size, config.vocab_size)


def _read_norm(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    weight = checkpoint.tensor(name).to(torch.float32, copy=True)
    require_finite(weight, name)
    return weight


def _read_linear(
    quant: QuantConfig | None, checkpoint: Checkpoint, name: str, in_features: int, out_features: int
) -> Linear:
    container = container_of(quant)
    if not container.holds(checkpoint, name):
        return DenseLinear(name, checkpoint.tensor(f"{name}.weight"), read_bias(checkpoint, name))
    settings = settings_of(quant, checkpoint, name, in_features)
    return container.read(checkpoint, name, in_features, out_features, settings)
