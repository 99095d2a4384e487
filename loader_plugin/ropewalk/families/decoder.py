"""The parts of decoder layers, and the layer of the Llama-like families, written as its equation.

    x <- x + w * Attention(RMSNorm(x))
    x <- x + w * MLP(RMSNorm(x))             with MLP(y) = (f(gate) * up) Down,    gate, up = y GateUp

`attn_norm`, `mlp_norm`: [C]; `q_norm`, `k_norm`: [D]. `qkv` maps C to (Hq + 2 * Hkv) * D, `o` Hq * D to C, `gate_up` C
to 2 * I and `down` I to C. w is the weight of a layer instance, times the family's scale of what is added.
"""

from __future__ import annotations

from collections.abc import Callable

from ropewalk.families.program import View
from ropewalk.families.recorder import LayerShape, Recorder

HeadNorm = Callable[[Recorder, View, str], View]


def decoder_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream."""
    x = ops.residual  # [T, 1, C]
    ops.add_residual_(attention(ops, ops.rms_norm(x, "attn_norm"), shape), shape.residual_scale)
    ops.add_residual_(gated_mlp(ops, ops.rms_norm(x, "mlp_norm"), shape), shape.residual_scale)


def attention(ops: Recorder, x: View, shape: LayerShape, head_norm: HeadNorm = Recorder.rms_norm) -> View:
    """x: [T, 1, C], normalised -> [T, 1, C]. head_norm: of queries and keys, where the model has one."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    q, k, v = ops.split(ops.linear(x, "qkv"), heads, kv_heads, kv_heads, size=shape.head_dim)
    if shape.qk_norm:
        q = head_norm(ops, q, "q_norm")  # [T, Hq, D]
        k = head_norm(ops, k, "k_norm")  # [T, Hkv, D]
    if shape.rotation is not None:
        ops.rotate_(q, shape.rotation)
        ops.rotate_(k, shape.rotation)
    ops.append(k, v)
    scale = shape.head_dim**-0.5 if shape.attention_scale is None else shape.attention_scale
    return ops.linear(ops.attend(q, shape.window, scale, shape.attention_cap), "o")


def gated_mlp(ops: Recorder, x: View, shape: LayerShape) -> View:
    """x: [T, 1, C], normalised -> [T, 1, C]."""
    return ops.linear(ops.gate(ops.linear(x, "gate_up"), shape.activation), "down")


def plain_mlp(ops: Recorder, x: View, shape: LayerShape) -> View:
    """f(x Up) Down. x: [T, 1, C], normalised -> [T, 1, C]."""
    return ops.linear(ops.activate(ops.linear(x, "up"), shape.activation), "down")
