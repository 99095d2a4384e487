"""One safetensors file: its header, checked completely, and its tensors as views of a memory mapping.

    +----------------+-----------------------------+--------------------------------+
    | u64 header_len | JSON header, header_len     | tensor bytes, back to back     |
    +----------------+-----------------------------+--------------------------------+
                                                   ^ data_offsets count from here

Read here instead of through the safetensors library, so that every damage has a message of its own, and so that the
mapping can be dropped between layers: pages of a mapping count as memory of this process for as long as it lives.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import mmap
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ropewalk.errors import CheckpointError

# The limit of the format itself.
MAX_HEADER_BYTES = 100_000_000

# Bits per element, and the torch type where we read it. The others may lie in a file as long as nothing asks for them.
DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "F64": (64, torch.float64),
    "F32": (32, torch.float32),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I64": (64, torch.int64),
    "I32": (32, torch.int32),
    "I16": (16, torch.int16),
    "I8": (8, torch.int8),
    "U8": (8, torch.uint8),
    "BOOL": (8, torch.bool),
    "U64": (64, None),
    "U32": (32, None),
    "U16": (16, None),
    "C64": (64, None),
    "F8_E4M3": (8, None),
    "F8_E5M2": (8, None),
    "F8_E8M0": (8, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor; `start` counts bytes from the beginning of the file."""

    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES
    file: Path
    start: int
    num_bytes: int


class SafetensorsFile:
    """The tensors of one file. The mapping is made when a tensor is first asked for, and again after `release()`."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the header of `path`.

        Raises:
            CheckpointError: not a readable file, truncated, or a header that is not what the format allows.
        """
        self.path = path
        header, self.num_bytes = _read_header(path)
        data_start = 8 + len(header)
        self.tensors = _parse_header(path, header, data_start, self.num_bytes)
        self._mapping: mmap.mmap | None = None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, a view of the mapping: valid (and its pages held) for as long as it lives. Read only.

        Raises:
            CheckpointError: a dtype that is not read, or a file that has changed since it was opened.
        """
        info = self.tensors[name]
        dtype = DTYPES[info.dtype][1]
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensor {name} has dtype {info.dtype}, which is not read")
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        mapping = self._map()
        if info.start % dtype.itemsize:
            # Only files of 2022 have headers that are not padded. A copy: kernels may assume aligned elements.
            flat = torch.frombuffer(mapping, dtype=torch.uint8, count=info.num_bytes, offset=info.start)
            return flat.clone().view(dtype).view(info.shape)
        count = info.num_bytes // dtype.itemsize
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=info.start).view(info.shape)

    def release(self) -> None:
        """Drops the mapping; its pages stop counting as our memory once no tensor of it is left."""
        self._mapping = None

    def _map(self) -> mmap.mmap:
        if self._mapping is None:
            try:
                with self.path.open("rb") as file:
                    # Copy-on-write, because torch accepts only writable buffers without a warning.
                    self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.path} cannot be mapped: {error}") from error
            if len(self._mapping) != self.num_bytes:
                self._mapping = None
                raise CheckpointError(f"{self.path} has changed while it was being read: load the model again")
        return self._mapping


def printable(name: object) -> str:
    """A name from a file as messages show it: on one line, printable, at most 120 characters."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else text[:117] + "..."


def _read_header(path: Path) -> tuple[bytes, int]:
    """The JSON bytes and the size of the file."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # reading a pipe or a device may never end
            kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise CheckpointError(f"{path} is {kind}: a safetensors file is expected under this name")
        with path.open("rb") as file:
            num_bytes = path.stat().st_size
            if num_bytes < 8:
                raise CheckpointError(
                    f"{path} has {num_bytes} bytes, too few for a safetensors header: the download is incomplete"
                )
            first = file.read(8)
            if first == b"version ":
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
            length = int.from_bytes(first, "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file: its header would be {length} bytes long, "
                    f"at most {MAX_HEADER_BYTES} are allowed"
                )
            if length > num_bytes - 8:
                raise CheckpointError(
                    f"{path} is truncated: its header is {length} bytes long, the file only {num_bytes}; "
                    "download it again"
                )
            return file.read(length), num_bytes
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse_header(path: Path, header: bytes, data_start: int, num_bytes: int) -> dict[str, TensorInfo]:
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: the safetensors header must be a JSON object, found {type(parsed).__name__}")
    parsed.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in parsed.items()}
    position, previous = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start != position:
            what = "overlaps" if info.start < position else "leaves a gap after"
            raise CheckpointError(f"{path}: tensor {printable(name)} {what} {previous}: the header is damaged")
        position, previous = info.start + info.num_bytes, f"tensor {printable(name)}"
    if position > num_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header describes {position} bytes, the file has {num_bytes}; download it again"
        )
    if position < num_bytes:
        raise CheckpointError(
            f"{path} has {num_bytes - position} bytes after its last tensor: it is damaged, or not a safetensors file"
        )
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("the same key appears twice")
    return result


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {printable(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: its header entry must be an object, found {type(entry).__name__}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {dtype!r:.40} is unknown; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: shape {shape!r:.80} is not a list of sizes")
    if math.prod(max(size, 1) for size in shape) >= 2**63:
        raise CheckpointError(f"{where}: shape {shape!r:.80} is larger than any memory")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r:.80} are not [begin, end]")
    bits = math.prod(shape) * DTYPES[dtype][0]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{where}: {dtype} {list(shape)!r:.80} needs {(bits + 7) // 8} bytes, "
            f"its data_offsets hold {offsets[1] - offsets[0]}"
        )
    return TensorInfo(tuple(shape), dtype, path, data_start + offsets[0], offsets[1] - offsets[0])


def _are_sizes(value: Any) -> bool:
    """True for a list of at most 16 integers from 0 to 2^63 - 1 (what the sizes of a tensor can be)."""
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63 for size in value)
    )
