"""Qwen1.5 and 2 with experts: Qwen2's attention, a mixture, and one more expert that every row takes in part.

x <- x + w * sum over e of share_e * MLP_e(y)
x <- x + w * sigmoid(y Shared_gate) * MLP_shared(y)
"""

from __future__ import annotations

from ropewalk.base.json import Section
from ropewalk.families.decoder import attention
from ropewalk.families.family import Family, Flag, Windows
from ropewalk.families.mixture import DENSE, EXPERTS, ROUTER, SPARSE, mixture, qwen_kinds, qwen_mixture
from ropewalk.families.program import View
from ropewalk.families.recorder import LayerShape, Mixture, Recorder
from ropewalk.families.tables import LLAMA_KIND, LLAMA_NORMS, OUTPUT, LayerKind, LinearEntry, queries_keys_values

SHARED = (
    LinearEntry("shared_gate", "mlp.shared_expert_gate", "hidden", "one"),
    LinearEntry("shared_gate_proj", "mlp.shared_expert.gate_proj", "hidden", "shared inner", group="shared_gate_up"),
    LinearEntry("shared_up_proj", "mlp.shared_expert.up_proj", "hidden", "shared inner", group="shared_gate_up"),
    LinearEntry("shared_down", "mlp.shared_expert.down_proj", "shared inner", "hidden"),
)


def shared_expert_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream."""
    x = ops.residual  # [T, 1, C]
    ops.add_residual_(attention(ops, ops.rms_norm(x, "attn_norm"), shape), shape.residual_scale)
    y = ops.rms_norm(x, "mlp_norm")
    routed, shared = mixture(ops, y, shape), _shared_expert(ops, y, shape)
    ops.add_residual_(routed, shape.residual_scale)
    ops.add_residual_(shared, shape.residual_scale)


def _shared_expert(ops: Recorder, x: View, shape: LayerShape) -> View:
    """x: [T, 1, C], normalised -> [T, 1, C]."""
    y = ops.linear(ops.gate(ops.linear(x, "shared_gate_up"), shape.activation), "shared_down")
    return ops.sigmoid_mul(y, ops.linear(x, "shared_gate"))


def _mixture(config: Section) -> Mixture:
    return qwen_mixture(config, num_experts=60, top_k=4, inner=1408, shared_inner=5632)


QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    max_position_embeddings=32768,
    num_kv_heads=16,
    flags=(Flag("qkv_bias", "qkv_bias"),),
    windows=Windows.SOME,
    mixture=_mixture,
    kinds={
        SPARSE: LayerKind(
            norms=LLAMA_NORMS,
            linears=queries_keys_values() + OUTPUT + ROUTER + SHARED,
            experts=EXPERTS,
            adds=("self_attn.o_proj", "mlp.shared_expert.down_proj"),
            layer=shared_expert_layer,
        ),
        DENSE: LLAMA_KIND,
    },
    kinds_of=qwen_kinds,
)
