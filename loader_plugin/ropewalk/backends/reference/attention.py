"""Rotation of heads, and causal attention over keys and values, in plain torch."""

from __future__ import annotations

import torch

from ropewalk.backends.shared import Seen
from ropewalk.base.errors import ShapeError

SCRATCH_BYTES = 1 << 26  # bound for the scores of one block of queries


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """x: [T, H, D], cos, sin: [T, R/2]; pairs (i, i + R/2) are rotated in place, dims from R on stay."""
    half = cos.shape[1]
    if cos.shape != sin.shape or cos.shape[0] != x.shape[0] or 2 * half > x.shape[2]:
        raise ShapeError(f"rotate: tables {list(cos.shape)} and {list(sin.shape)} do not fit x {list(x.shape)}")
    cos, sin = cos[:, None, :], sin[:, None, :]  # [T, 1, R/2]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)  # [T, H, R]
    x[..., : 2 * half] = rotated


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, seen: Seen) -> torch.Tensor:
    """q: [T, Hq, D] at positions start..start+T; keys, values: [Hkv, S, D], S >= start+T -> [T, Hq * D] float32."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys, kv_head_dim = keys.shape
    end = start + num_queries
    if head_dim != kv_head_dim or num_heads % num_kv_heads or start < 0 or end > num_keys:
        raise ShapeError(
            f"attend: q {list(q.shape)} at {start} does not fit {num_keys} keys, {num_kv_heads} heads of {kv_head_dim}"
        )
    out = torch.empty(num_queries, num_heads * head_dim, device=q.device)
    rows = max(1, SCRATCH_BYTES // (4 * num_heads * end))
    for first in range(0, num_queries, rows):
        last = min(first + rows, num_queries)
        out[first:last] = _attend_block(q[first:last], keys, values, start + first, seen)
    return out


def _attend_block(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, seen: Seen) -> torch.Tensor:
    """Masked softmax over all keys that a block of queries can see. q: [T, Hq, D] -> [T, Hq * D]."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, end = keys.shape[0], start + num_queries
    window = seen.window
    low = 0 if window is None else max(0, start - window + 1)
    k, v = keys[:, low:end].float(), values[:, low:end].float()  # [Hkv, S, D]
    query_pos = torch.arange(start, end, device=q.device)[:, None]  # [T, 1]
    key_pos = torch.arange(low, end, device=q.device)[None, :]  # [1, S]
    hidden = key_pos > query_pos
    if window is not None:
        hidden |= key_pos <= query_pos - window
    groups = q.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [Hkv, Hq/Hkv, T, D]
    scores = groups @ k.transpose(1, 2)[:, None] * seen.scale  # [Hkv, Hq/Hkv, T, S]
    if seen.softcap is not None:
        scores = seen.softcap * torch.tanh(scores / seen.softcap)
    probabilities = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    return (probabilities @ v[:, None]).permute(2, 0, 1, 3).reshape(num_queries, num_heads * head_dim)
