"""Stand-in until the kernels of low-rank changes are merged."""

import torch
from ropewalk.backends.protocol import LowRankPart


class GpuLowRank:
    def __init__(self, parts):
        self.parts = parts

    @property
    def num_bytes(self):
        return sum(4 * (p.a.numel() + p.b.numel()) for p in self.parts)


def pack(parts, device):
    return GpuLowRank(tuple(LowRankPart(p.a.to(device), p.b.to(device)) for p in parts))


def add_(y, x, change, first, end):
    rows = slice(first, end)
    y[rows] += torch.cat([(x[rows] @ p.a.T) @ p.b.T for p in change.parts], dim=1)
