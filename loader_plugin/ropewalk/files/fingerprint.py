"""A fingerprint of weights, from a sample of the bytes of each tensor: fast, because it is taken while they are loaded.

It differs if a name, a shape or a dtype differs; if any byte of a tensor of up to 64 KiB does (norms, biases, most
scales and orders of rows); or if a byte does in one of 64 blocks of 256 bytes, spread evenly over a larger tensor. So
it tells apart models, fine-tunes, merged adapters and quantisations, which change whole matrices. It does not notice
single numbers of a large matrix that somebody edited between those blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

import torch

WHOLE_BYTES = 1 << 16
NUM_BLOCKS = 64
BLOCK_BYTES = 256


def tensor_sample(tensor: torch.Tensor) -> bytes:
    """A digest of dtype, shape and a sample of the bytes of a contiguous tensor on the CPU."""
    values = memoryview(tensor.flatten().view(torch.uint8).numpy())
    digest = sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if len(values) <= WHOLE_BYTES:
        digest.update(values)
        return digest.digest()
    last = len(values) - BLOCK_BYTES
    for number in range(NUM_BLOCKS):
        first = last * number // (NUM_BLOCKS - 1)
        digest.update(values[first : first + BLOCK_BYTES])
    return digest.digest()


def joint_fingerprint(samples: Mapping[str, bytes]) -> str:
    """The fingerprint of tensors by name, in hexadecimal; their order does not matter."""
    digest = sha256()
    for name, sample in sorted(samples.items()):
        digest.update(f"{len(name)} {name}".encode("utf-8", "surrogatepass"))
        digest.update(sample)
    return digest.hexdigest()
