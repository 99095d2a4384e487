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

import torch

from ropewalk.base.errors import UnsupportedError
from ropewalk.gptq.linear import DenseLinear, GptqLinear, sequential_groups

RUN_INPUTS = {8: 64, 4: 32}  # of one scale, by bits
BLOCK_FLOATS = 1 << 20  # of rows that are rounded together: larger pieces of memory are new to the process each time


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


def _rounded(head: DenseLinear, bits: int) -> GptqLinear:
    num_outputs, num_inputs = head.weight.shape
    starts = sequential_groups(num_inputs, RUN_INPUTS[bits])
    scales = torch.empty(num_outputs, len(starts) - 1)
    zeros = torch.empty(len(starts) - 1, num_outputs, dtype=torch.uint8)
    qweight = torch.empty(num_inputs * bits // 32, num_outputs, dtype=torch.int32)
    step = max(1, BLOCK_FLOATS // num_inputs)
    blocks = [slice(first, min(first + step, num_outputs)) for first in range(0, num_outputs, step)]
    for rows in blocks:
        scales[rows] = _run_scales(_runs(head.weight[rows], bits), bits)
    dtype = _scale_dtype(scales)
    scales = scales.to(dtype)
    for rows in blocks:
        codes, zeros[:, rows] = _rounded_rows(head.weight[rows], scales[rows].float(), bits)
        qweight[:, rows] = _words(codes, bits).T
    return GptqLinear(
        name=head.name,
        bits=bits,
        in_features=num_inputs,
        out_features=num_outputs,
        planar=False,
        qweight=qweight,
        scales=scales.T.contiguous(),
        zeros=zeros,
        group_starts=starts,
        order=None,
        bias=head.bias,
        rounds_inputs=False,
    )


def _scale_dtype(scales: torch.Tensor) -> torch.dtype:
    """float16, unless a scale that is not zero leaves its normal numbers."""
    limits = torch.finfo(torch.float16)
    leaves = (scales > limits.max) | ((scales < limits.tiny) & (scales > 0))
    return torch.float32 if bool(leaves.any()) else torch.float16


def _rounded_rows(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of the head and the scales [rows, G] of their runs -> codes [rows, C], zeros [G, rows], both uint8."""
    runs = _runs(weight, bits)  # [rows, G, run]
    divisors = torch.where(scales > 0, scales, 1.0)
    if bits == 8:
        zeros = torch.full_like(scales, 128.0)
    else:
        zeros = (-runs.amin(2).clamp_max(0.0) / divisors).round_().clamp_(0, 15)
    codes = runs.div_(divisors[:, :, None]).round_().add_(zeros[:, :, None])
    codes = codes.clamp_(1 if bits == 8 else 0, (1 << bits) - 1).to(torch.uint8).flatten(1)  # [rows, G * run]
    return codes[:, : weight.shape[1]], zeros.to(torch.uint8).T


def _runs(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, C] -> [rows, G, run] float32, a copy, zeros past C."""
    floats = weight.to(torch.float32, copy=True)
    padded = torch.nn.functional.pad(floats, (0, -weight.shape[1] % RUN_INPUTS[bits]))
    return padded.unflatten(1, (-1, RUN_INPUTS[bits]))


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
