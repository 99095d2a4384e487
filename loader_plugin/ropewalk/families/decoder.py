"""One decoder layer of the Llama-like families, written as its equation.

    x <- x + w * Attention(RMSNorm(x))
    x <- x + w * (silu(gate) * up) Down      with gate, up = RMSNorm(x) GateUp

`attn_norm`, `mlp_norm`: [C]; `q_norm`, `k_norm`: [D]. `qkv` maps C to (Hq + 2 * Hkv) * D, `o` Hq * D to C, `gate_up` C
to 2 * I and `down` I to C.
"""

from __future__ import annotations

from ropewalk.families.program import Activation, View
from ropewalk.families.recorder import LayerShape, Recorder


def decoder_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream."""
    x = ops.residual  # [T, 1, C]
    ops.add_residual_(_attention(ops, ops.rms_norm(x, "attn_norm"), shape))
    ops.add_residual_(_mlp(ops, ops.rms_norm(x, "mlp_norm")))


def _attention(ops: Recorder, x: View, shape: LayerShape) -> View:
    """x: [T, 1, C], normalised -> [T, 1, C]."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    q, k, v = ops.split(ops.linear(x, "qkv"), heads, kv_heads, kv_heads, size=shape.head_dim)
    if shape.qk_norm:
        q = ops.rms_norm(q, "q_norm")  # [T, Hq, D]
        k = ops.rms_norm(k, "k_norm")  # [T, Hkv, D]
    ops.rotate_(q)
    ops.rotate_(k)
    ops.append(k, v)
    return ops.linear(ops.attend(q, shape.window, shape.head_dim**-0.5), "o")


def _mlp(ops: Recorder, x: View) -> View:
    """x: [T, 1, C], normalised -> [T, 1, C]."""
    return ops.linear(ops.gate(ops.linear(x, "gate_up"), Activation.SILU), "down")
