"""Layers whose feed-forward block is a mixture of experts: a router sends each row to a few of them.

x <- x + w * Attention(RMSNorm(x))
x <- x + w * sum over e of share_e * MLP_e(y)          with y = RMSNorm(x), the experts e by softmax(y Router)
                                                       (Shazeer et al. 2017, arXiv:1701.06538)
"""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.base.json import Section
from ropewalk.base.limits import MAX_EXPERTS, MAX_FEATURES, MAX_LAYERS
from ropewalk.families.decoder import attention
from ropewalk.families.program import View
from ropewalk.families.recorder import LayerShape, Mixture, Recorder
from ropewalk.families.tables import ExpertsEntry, LinearEntry

SPARSE, DENSE = "mixture", "dense"

ROUTER = (LinearEntry("router", "mlp.gate", "hidden", "experts"),)
EXPERTS = ExpertsEntry(
    "experts", "mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj", "mlp.experts.{expert}.down_proj"
)


def sparse_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream."""
    x = ops.residual  # [T, 1, C]
    ops.add_residual_(attention(ops, ops.rms_norm(x, "attn_norm"), shape), shape.residual_scale)
    ops.add_residual_(mixture(ops, ops.rms_norm(x, "mlp_norm"), shape), shape.residual_scale)


def mixture(ops: Recorder, x: View, shape: LayerShape) -> View:
    """x: [T, 1, C], normalised -> [T, 1, C]."""
    assert shape.mixture is not None
    routes = ops.route(ops.linear(x, "router"), shape.mixture.top_k, shape.mixture.normalised)  # [T, 2, top_k]
    return ops.experts(x, routes, "experts", shape.activation)


def qwen_kinds(config: Section, num_layers: int) -> Sequence[str]:
    """Every `decoder_sparse_step`-th layer has experts, unless `mlp_only_layers` names it."""
    step = config.optional_integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
    plain = config.values.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(type(index) is int for index in plain):
        raise config.error("mlp_only_layers", "a list of the numbers of layers")
    return [DENSE if index in plain or (index + 1) % step else SPARSE for index in range(num_layers)]


def read_top_k(config: Section, num_experts: int, default: int) -> int:
    """`num_experts_per_tok`, at most all of them."""
    return config.optional_integer("num_experts_per_tok", 1, num_experts, min(default, num_experts))


def qwen_mixture(config: Section, *, num_experts: int, top_k: int, inner: int, shared_inner: int = 0) -> Mixture:
    """As Qwen's mixtures spell it. num_experts and the others: where a key is absent; shared_inner 0: there is none."""
    # transformers 5 writes num_local_experts.
    other = config.optional_integer("num_local_experts", 1, MAX_EXPERTS, num_experts)
    count = config.optional_integer("num_experts", 1, MAX_EXPERTS, other)
    if shared_inner:
        shared_inner = config.optional_integer("shared_expert_intermediate_size", 1, MAX_FEATURES, shared_inner)
    return Mixture(
        num_experts=count,
        top_k=read_top_k(config, count, top_k),
        inner=config.optional_integer("moe_intermediate_size", 1, MAX_FEATURES, inner),
        normalised=config.boolean("norm_topk_prob", False),
        shared_inner=shared_inner,
    )
