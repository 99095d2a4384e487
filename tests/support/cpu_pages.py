"""Pages of the CPU backend as numpy reads them, from the pictures of native/README.md alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ropewalk.config.cache_format import CacheFormat

BITS = {"q8": 8, "q6": 6, "q4": 4}
FLOATS = {"fp16": np.float16, "fp32": np.float32}
PLACES = 64


@dataclass(frozen=True)
class Half:
    """Keys or values of one layer instance of a page. codes: [Hkv, 64, P], scales: [Hkv, 64, P/32], or floats alone."""

    coded: np.ndarray  # [Hkv, 64, D] float64, rotated where the codes are
    numbers: np.ndarray  # the same turned back
    codes: np.ndarray | None = None
    scales: np.ndarray | None = None


def halves_of(memory: np.ndarray, cache_format: CacheFormat, heads: int, dim: int, instance: int) -> tuple[Half, Half]:
    """Keys and values of one layer instance; memory: [bytes] uint8 of a page."""
    sizes = [half_bytes(kind, dim, pad) for kind, pad in ((cache_format.keys, 1), (cache_format.values, 16))]
    whole = memory[instance * heads * sum(sizes) :][: heads * sum(sizes)].reshape(heads, sum(sizes))
    keys, values = whole[:, : sizes[0]], whole[:, sizes[0] :]
    return read_half(keys, cache_format.keys, dim, True), read_half(values, cache_format.values, dim, False)


def half_bytes(kind: str, dim: int, pad: int) -> int:
    if kind in FLOATS:
        return PLACES * -(-dim // pad) * pad * np.dtype(FLOATS[kind]).itemsize
    blocks = -(-dim // 32)
    return PLACES * blocks * (4 * BITS[kind] + 2)


def read_half(memory: np.ndarray, kind: str, dim: int, is_keys: bool) -> Half:
    """memory: [Hkv, bytes] uint8."""
    memory = np.ascontiguousarray(memory)
    heads = len(memory)
    if kind in FLOATS:
        stored = memory.view(FLOATS[kind])
        if is_keys:
            numbers = stored.reshape(heads, 4, dim, 16).transpose(0, 1, 3, 2).reshape(heads, 64, dim).astype(float)
        else:
            numbers = stored.reshape(heads, 64, -1)[:, :, :dim].astype(float)
        return Half(numbers, numbers)
    bits, blocks = BITS[kind], -(-dim // 32)
    codes = memory[:, : 256 * blocks * bits]
    scales = np.ascontiguousarray(memory[:, 256 * blocks * bits :]).view(np.float16)
    if is_keys:
        codes = key_codes(codes.reshape(heads, 4, blocks, 64 * bits), bits)
        scales = scales.reshape(heads, 4, blocks, 16).transpose(0, 1, 3, 2).reshape(heads, 64, blocks)
    else:
        codes = value_codes(codes.reshape(heads, 2 * blocks, 2, 64 * bits), bits)
        scales = scales.reshape(heads, blocks, 64).transpose(0, 2, 1)  # [heads, 64, blocks]
    steps = np.repeat(scales.astype(float), 32, axis=2)  # [heads, 64, P]
    coded = (steps * (codes - (2**bits - 1) / 2))[:, :, :dim]
    return Half(coded, coded if bits == 8 else coded @ hadamard_matrix(dim), codes, scales)


def key_codes(tiles: np.ndarray, bits: int) -> np.ndarray:
    """[heads, 4, blocks, 64 * bits] uint8 -> [heads, 64, P]."""
    heads, _, blocks, _ = tiles.shape
    out = np.zeros((heads, 4, 16, blocks, 32), np.uint8)  # tile, key, block, dim
    for dim in range(32):
        quad, j, upper = dim % 16 // 4, dim % 4, dim // 16
        if bits == 8:
            found = tiles[..., dim // 4 * 64 + np.arange(16) * 4 + j]
        else:
            found = tiles[..., quad * 64 + np.arange(16) * 4 + j] >> 4 * upper & 15
        if bits == 6:
            plane = tiles[..., 256 + quad // 2 * 64 + np.arange(16) * 4 + j]
            found = found | (plane >> 2 * (quad % 2 * 2 + upper) & 3) << 4
        out[..., dim] = found.swapaxes(2, 3)  # [heads, 4, 16, blocks]
    return out.reshape(heads, 64, blocks * 32)


def value_codes(tiles: np.ndarray, bits: int) -> np.ndarray:
    """[heads, P / 16, 2, 64 * bits] uint8 -> [heads, 64, P]."""
    heads, groups = tiles.shape[:2]
    words = np.ascontiguousarray(tiles).view("<u2").reshape(heads, groups, 2, -1, 16, 2)  # line, dim, word of the lane
    out = np.zeros((heads, 2, 32, groups, 16), np.uint8)  # half, key, group, dim
    for key in range(32):
        if bits == 8:
            found = words[..., key // 4, :, key % 2] >> 8 * (key % 4 // 2) & 255
        else:
            found = words[..., key // 8, :, key % 2] >> 4 * (key % 8 // 2) & 15
        if bits == 6:
            plane = words[..., 4 + key // 16, :, key % 2]
            found = found | (plane >> 2 * (key % 16 // 8 * 4 + key % 8 // 2) & 3) << 4
        out[:, :, key] = found.swapaxes(1, 2)  # [heads, 2, groups, 16]
    return out.reshape(heads, 64, groups * 16)


def hadamard_matrix(dim: int) -> np.ndarray:
    """[D, D], Sylvester's matrix for each piece of the largest power of two that divides D."""
    size, matrix = dim & -dim, np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(dim // size), matrix / np.sqrt(size))
