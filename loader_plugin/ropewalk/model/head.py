"""The head in fewer bits than it is stored in: reading it is a fifth of a token of a 1.1B model in float16.

A head [V, C] that is stored in floats becomes a GPTQ linear, rounded by the rule of gptq/rounding.py, so that every
backend multiplies it as it does the other quantised linears, with the same arithmetic.

In "int8" its activations stay float32: rounding them to 8 bits as well doubles what the head costs (a KL divergence of
1.4e-4 in place of 0.7e-4 on a small checkpoint), and reading the codes takes longer than the products.

A tied embedding table stays beside the codes as it is stored: tokens are looked up in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ropewalk.base.errors import UnsupportedError
from ropewalk.gptq.linear import DenseLinear, GptqLinear, sequential_groups
from ropewalk.gptq.rounding import RUN_INPUTS, RoundedRows, round_rows

RoundRows = Callable[[torch.Tensor, int], RoundedRows]  # as `gptq.rounding.round_rows`


def rounded_bits(head_bits: str | int, compute: str) -> int | None:
    """The bits that `head_bits` of `load_model` asks for under an arithmetic; None: as stored.

    "auto": 8 where activations are rounded to 8 bits as well.
    """
    if str(head_bits) == "auto":
        return 8 if compute == "int8" else None
    return {"8": 8, "4": 4}.get(str(head_bits))


def can_round(num_inputs: int, bits: int) -> bool:
    """Whether a row of codes fills whole words."""
    return num_inputs * bits % 32 == 0


def rounded_bytes(num_outputs: int, num_inputs: int, bits: int) -> int:
    """Of the codes, scales and zero points (which are all equal with 8 bits)."""
    runs = -(-num_inputs // RUN_INPUTS[bits])
    return num_outputs * (num_inputs * bits // 8 + runs * (2 if bits == 8 else 3))


def held_head(
    head: GptqLinear | DenseLinear, head_bits: str | int, compute: str, rounding: RoundRows = round_rows
) -> GptqLinear | DenseLinear:
    """The head as it is held: rounded if it is stored in floats and should be. rounding: the backend's own.

    Raises:
        UnsupportedError: asked for by number, and its rows do not fill whole words.
    """
    bits = rounded_bits(head_bits, compute)
    if bits is None or isinstance(head, GptqLinear):
        return head
    num_inputs = head.weight.shape[1]
    if can_round(num_inputs, bits):
        return _rounded(head, bits, rounding)
    if str(head_bits) == "auto":
        return head
    raise UnsupportedError(
        f"head_bits={head_bits}: {head.name} has {num_inputs} inputs, and a multiple of {32 // bits} is needed; use "
        "head_bits=16"
    )


def _rounded(head: DenseLinear, bits: int, round_rows: RoundRows) -> GptqLinear:
    num_outputs, num_inputs = head.weight.shape
    rounded = round_rows(head.weight, bits)
    return GptqLinear(
        name=head.name,
        bits=bits,
        in_features=num_inputs,
        out_features=num_outputs,
        planar=False,
        qweight=rounded.qweight,
        scales=rounded.scales,
        zeros=rounded.zeros,
        group_starts=sequential_groups(num_inputs, RUN_INPUTS[bits]),
        order=None,
        bias=head.bias,
        rounds_inputs=False,
    )
