"""A matrix of floats as a GPTQ linear of 8 or 4 bits: rounded to nearest (ties to even) by runs of inputs of each row.

    8 bits, runs of 64:  s = max |w| / 127             code = 128 + rint(w / s)
    4 bits, runs of 32:  s = (max(w, 0) - min(w, 0)) / 15    zero = rint(-min(w, 0) / s)    code = zero + rint(w / s)

s is rounded to float16 before it divides (to float32 if one of them is no normal number there), and codes are clamped
to their range. Here it is written in torch; native/cpu/generic/round.inl.hpp does the same to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

RUN_INPUTS = {8: 64, 4: 32}  # of one scale, by bits
BLOCK_FLOATS = 1 << 20  # of rows that are rounded together: larger pieces of memory are new to the process each time


class RoundedRows(NamedTuple):
    """What a GPTQ linear is made of: G runs of the inputs."""

    qweight: torch.Tensor  # [K * bits / 32, N] int32
    scales: torch.Tensor  # [G, N] float16 or float32
    zeros: torch.Tensor  # [G, N] uint8


def round_rows(weight: torch.Tensor, bits: int) -> RoundedRows:
    """weight: [N, K] float16, bfloat16 or float32, K a multiple of 32 / bits. bits: 8 or 4."""
    num_outputs, num_inputs = weight.shape
    num_runs = -(-num_inputs // RUN_INPUTS[bits])
    scales = torch.empty(num_outputs, num_runs)
    zeros = torch.empty(num_runs, num_outputs, dtype=torch.uint8)
    qweight = torch.empty(num_inputs * bits // 32, num_outputs, dtype=torch.int32)
    step = max(1, BLOCK_FLOATS // num_inputs)
    blocks = [slice(first, min(first + step, num_outputs)) for first in range(0, num_outputs, step)]
    for rows in blocks:
        scales[rows] = _run_scales(_runs(weight[rows], bits), bits)
    scales = scales.to(_scale_dtype(scales))
    for rows in blocks:
        codes, zeros[:, rows] = _rounded_rows(weight[rows], scales[rows].float(), bits)
        qweight[:, rows] = _words(codes, bits).T
    return RoundedRows(qweight, scales.T.contiguous(), zeros)


def _scale_dtype(scales: torch.Tensor) -> torch.dtype:
    """float16, unless a scale that is not zero leaves its normal numbers."""
    limits = torch.finfo(torch.float16)
    leaves = (scales > limits.max) | ((scales < limits.tiny) & (scales > 0))
    return torch.float32 if bool(leaves.any()) else torch.float16


def _rounded_rows(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows and the scales [rows, G] of their runs -> codes [rows, C], zeros [G, rows], both uint8."""
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
