"""Rows of keys and values as codes, as config/cache_format.py defines them, in plain torch."""

from __future__ import annotations

import torch

from ropewalk.config.cache_format import BLOCK, hadamard_size


def padded_dim(head_dim: int) -> int:
    """D in whole blocks."""
    return -(-head_dim // BLOCK) * BLOCK


def encode(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [..., D] float32 -> codes [..., P] uint8, scales [..., P/32] float16; P is D in whole blocks."""
    zero = (2**bits - 1) / 2
    blocks = torch.nn.functional.pad(x, (0, padded_dim(x.shape[-1]) - x.shape[-1]))
    blocks = blocks.unflatten(-1, (-1, BLOCK))  # [..., P/32, 32]
    scales = (blocks.abs().amax(-1) / zero).half()  # [..., P/32]
    steps = scales.float()[..., None]
    codes = torch.where(steps == 0, 0.0, blocks / steps + zero).round().nan_to_num(0.0).clamp(0, 2**bits - 1)
    return codes.to(torch.uint8).flatten(-2), scales  # [..., P]


def decode(codes: torch.Tensor, scales: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    """codes: [..., P] uint8, scales: [..., P/32] float16 -> [..., D] float32."""
    blocks = codes.float().unflatten(-1, (-1, BLOCK)) - (2**bits - 1) / 2  # [..., P/32, 32]
    return (blocks * scales.float()[..., None]).flatten(-2)[..., :head_dim]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes: [..., P] uint8 -> [..., P * bits / 8] uint8.

    4 bits: the first half of a row in the low nibbles, the second in the high ones. 6 bits: the low 4 bits like this,
    then the upper 2 bits of four quarters of the row, the first quarter lowest.
    """
    if bits == 8:
        return codes
    low, high = (codes & 15).chunk(2, dim=-1)  # [..., P/2] each
    nibbles = low | high << 4
    if bits == 4:
        return nibbles
    quarters = (codes >> 4).chunk(4, dim=-1)  # [..., P/4] each
    pairs = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    return torch.cat([nibbles, pairs], dim=-1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """packed: [..., P * bits / 8] uint8 -> codes [..., P] uint8."""
    if bits == 8:
        return packed
    size = packed.shape[-1] * 8 // bits
    nibbles = packed[..., : size // 2]
    low = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)  # [..., P]
    if bits == 4:
        return low
    pairs = packed[..., size // 2 :]
    return low | torch.cat([pairs >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1) << 4


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x: [..., D] float32, each piece of `hadamard_size(D)` numbers times the normalised Hadamard matrix."""
    size = hadamard_size(x.shape[-1])
    pieces = x.unflatten(-1, (-1, size))  # [..., D/h, h]
    stride = 1
    while stride < size:
        first, second = pieces.unflatten(-1, (-1, 2, stride)).unbind(-2)  # [..., D/h, h/(2 stride), stride] each
        pieces = torch.stack([first + second, first - second], dim=-2).flatten(-3)  # [..., D/h, h]
        stride *= 2
    return (pieces * size**-0.5).flatten(-2)
