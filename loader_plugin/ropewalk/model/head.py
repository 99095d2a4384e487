"""The head in fewer bits than it is stored in: reading it is a fifth of a token of a 1.1B model in float16.

A head [V, C] that is stored in floats becomes a GPTQ linear, rounded to nearest (ties to even) by runs of inputs of
each row, so that every backend multiplies it as it does the other quantised linears, with the same arithmetic:

    8 bits, runs of 64:  s = max |w| / 127             code = 128 + rint(w / s)
    4 bits, runs of 32:  s = (max(w, 0) - min(w, 0)) / 15    zero = rint(-min(w, 0) / s)    code = zero + rint(w / s)

In "int8" its activations stay float32: rounding them to 8 bits as well doubles what the head costs (a KL divergence of
1.4e-4 in place of 0.7e-4 on a small checkpoint), and reading the codes takes longer than the products.

s is rounded to float16 before it divides (to float32 if one of them is no normal number there), and codes are clamped
to their range. A tied embedding table stays beside the codes as it is stored: tokens are looked up in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ropewalk.base.errors import UnsupportedError
from ropewalk.gptq.linear import DenseLinear, GptqLinear, sequential_groups

RUN_INPUTS = {8: 64, 4: 32}  # of one scale, by bits
BLOCK_FLOATS = 1 << 22  # of rows that are rounded together: they stay in the second cache


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


def held_head(head: GptqLinear | DenseLinear, head_bits: str | int, compute: str) -> GptqLinear | DenseLinear:
    """The head as it is held: rounded if it is stored in floats and should be.

    Raises:
        UnsupportedError: asked for by number, and its rows do not fill whole words.
    """
    bits = rounded_bits(head_bits, compute)
    if bits is None or isinstance(head, GptqLinear):
        return head
    num_inputs = head.weight.shape[1]
    if can_round(num_inputs, bits):
        return _rounded(head, bits)
    if str(head_bits) == "auto":
        return head
    raise UnsupportedError(
        f"head_bits={head_bits}: {head.name} has {num_inputs} inputs, and a multiple of {32 // bits} is needed; use "
        "head_bits=16"
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of the head, rounded. codes: [rows, C]; scales, zeros: [rows, G]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def _rounded(head: DenseLinear, bits: int) -> GptqLinear:
    num_outputs, num_inputs = head.weight.shape
    starts = sequential_groups(num_inputs, RUN_INPUTS[bits])
    scales = torch.empty(len(starts) - 1, num_outputs)  # [G, V]
    zeros = torch.empty(len(starts) - 1, num_outputs, dtype=torch.uint8)
    qweight = torch.empty(num_inputs * bits // 32, num_outputs, dtype=torch.int32)
    dtype = _scale_dtype(head.weight, bits)
    step = max(1, BLOCK_FLOATS // num_inputs)
    for first in range(0, num_outputs, step):
        end = min(first + step, num_outputs)
        rows = _rounded_rows(head.weight[first:end], bits, dtype)
        scales[:, first:end], zeros[:, first:end] = rows.scales.T, rows.zeros.T
        qweight[:, first:end] = _words(rows.codes, bits).T
    return GptqLinear(
        name=head.name,
        bits=bits,
        in_features=num_inputs,
        out_features=num_outputs,
        planar=False,
        qweight=qweight,
        scales=scales.to(dtype),
        zeros=zeros,
        group_starts=starts,
        order=None,
        bias=head.bias,
        rounds_inputs=False,
    )


def _scale_dtype(weight: torch.Tensor, bits: int) -> torch.dtype:
    """float16, unless a scale that is not zero leaves its normal numbers."""
    limits = torch.finfo(torch.float16)
    step = max(1, BLOCK_FLOATS // weight.shape[1])
    for rows in weight.split(step):
        scales = _run_scales(_runs(rows, bits), bits)
        if bool(((scales > limits.max) | ((scales < limits.tiny) & (scales > 0))).any()):
            return torch.float32
    return torch.float16


def _rounded_rows(weight: torch.Tensor, bits: int, dtype: torch.dtype) -> _Rows:
    runs = _runs(weight, bits)  # [rows, G, run]
    scales = _run_scales(runs, bits).to(dtype).float()  # [rows, G]
    divisors = torch.where(scales > 0, scales, 1.0)
    if bits == 8:
        zeros = torch.full_like(scales, 128.0)
    else:
        zeros = (-runs.amin(2).clamp_max(0.0) / divisors).round_().clamp_(0, 15)
    codes = (runs / divisors[:, :, None]).round_().add_(zeros[:, :, None])
    codes = codes.clamp_(1 if bits == 8 else 0, (1 << bits) - 1).to(torch.uint8).flatten(1)  # [rows, G * run]
    return _Rows(codes[:, : weight.shape[1]], scales, zeros.to(torch.uint8))


def _runs(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, C] -> [rows, G, run] float32, zeros past C."""
    run = RUN_INPUTS[bits]
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % run))
    return padded.unflatten(1, (-1, run))


def _run_scales(runs: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, G, run] -> [rows, G] float32."""
    if bits == 8:
        return runs.abs().amax(2) / 127
    return (runs.amax(2).clamp_min(0.0) - runs.amin(2).clamp_max(0.0)) / 15


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, C] uint8 -> [rows, C * bits / 32] int32, the first code in the lowest bits."""
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)
