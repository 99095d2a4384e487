"""One safetensors file: names, shapes, and tensors read into memory of their own.

Files are never memory-mapped. The safetensors library maps every file it opens, so it is used for writing only. A
mapping would save a copy, but it lives as long as its tensors, and truncating or rewriting a mapped file kills the
process that serves from it (SIGBUS) or changes what it computes. If a file changes between two reads, the error names
it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

from ropewalk.base.errors import CheckpointError, brief
from ropewalk.files.reader import FileReader
from ropewalk.files.safetensors_header import read_header

GIT_LFS_POINTER = b"version https://git-lfs"
DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32},
    **{"I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
PIECE_BYTES = 16 << 20  # read at a time when a tensor is only compared
GAP_BYTES = 64 << 10  # between tensors: reading them is cheaper than another read


class SafetensorsFile:
    """The tensors of one file. Each read opens it anew; it must not have changed since its header was read.

    remedy, again: what messages advise for a damaged file, and for one that changes while it is read. reader: threads
    and memory for its tensors; default: one thread and new memory for each.
    """

    def __init__(
        self,
        path: Path,
        remedy: str = "download it again",
        again: str = "load the model again",
        reader: FileReader | None = None,
    ) -> None:
        """Reads and checks the header of `path`.

        Raises:
            CheckpointError: the file cannot be read or is truncated, or its header violates the format.
        """
        self.path = path
        self._again = again
        self._reader = FileReader() if reader is None else reader
        try:
            _refuse_irregular(path)
            with path.open("rb") as file:
                self._state = _state(os.fstat(file.fileno()))
                self.num_bytes = self._state[0]
                _refuse_pointer(file, path)
                header = read_header(file, path, self.num_bytes)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(
                f"{path} is damaged, truncated, or not a safetensors file ({brief(error)}): {remedy}"
            ) from error
        self.tensors = header.tensors
        self.metadata = header.metadata
        self.header = header.text

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, in memory of its own.

        Raises:
            CheckpointError: a dtype that is not read, or a file that has changed since its header was read.
        """
        dtype, info = self._dtype(name), self.tensors[name]
        values = self._reader.take(info.num_bytes)
        self._read(values, info.offset)
        return values.view(dtype).view(info.shape)

    def tensors_at_once(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """These tensors; those that lie side by side are read together, and share their memory.

        Raises:
            CheckpointError: as `tensor`.
        """
        found = {}
        for run in self._runs(names):
            dtypes = [self._dtype(name) for name in run]
            first, end = self._span(run)
            values = self._reader.take(end - first)
            self._read(values, first)
            for name, dtype in zip(run, dtypes, strict=True):
                info = self.tensors[name]
                start = info.offset - first
                part = values[start : start + info.num_bytes]
                part = part.clone() if start % dtype.itemsize else part  # else no view of it
                found[name] = part.view(dtype).view(info.shape)
        return found

    def read_(self, name: str, first: int, out: torch.Tensor) -> None:
        """Fill out: [n] uint8, on the CPU, with the bytes of a tensor from its byte `first` on.

        Raises:
            CheckpointError: the file has changed since its header was read.
        """
        info = self.tensors[name]
        if not 0 <= first <= first + len(out) <= info.num_bytes:
            raise ValueError(f"bytes {first} to {first + len(out)} of {name}, which has {info.num_bytes}")
        self._read(out, info.offset + first)

    def holds(self, name: str, tensor: torch.Tensor) -> bool:
        """True if the tensor stored under that name equals this one, bit for bit. Reads it in small pieces.

        Raises:
            CheckpointError: the file has changed since its header was read.
        """
        info = self.tensors[name]
        if info.shape != tuple(tensor.shape) or DTYPES.get(info.dtype) != tensor.dtype:
            return False
        ours = tensor.contiguous().flatten().view(torch.uint8)
        piece = torch.empty(min(PIECE_BYTES, info.num_bytes), dtype=torch.uint8)
        for first in range(0, info.num_bytes, PIECE_BYTES):
            stored = piece[: info.num_bytes - first]
            self._read(stored, info.offset + first)
            if not torch.equal(stored, ours[first : first + len(stored)]):
                return False
        return True

    def will_need(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors into its cache. A hint: failures are ignored."""
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError), self.path.open("rb", buffering=0) as file:
            for run in self._runs(names):
                first, end = self._span(run)
                os.posix_fadvise(file.fileno(), first, end - first, os.POSIX_FADV_WILLNEED)

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self.tensors[name].dtype
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {printable(name)} cannot be read: its dtype is {dtype}, accepted: "
                f"{', '.join(DTYPES)}"
            )
        return DTYPES[dtype]

    def _runs(self, names: Iterable[str]) -> list[list[str]]:
        """The tensors in the order of the file, those that lie side by side together."""
        runs: list[list[str]] = []
        for name in sorted(names, key=lambda name: self.tensors[name].offset):
            if not runs or self.tensors[name].offset - self._span(runs[-1])[1] > GAP_BYTES:
                runs.append([])
            runs[-1].append(name)
        return runs

    def _span(self, run: Sequence[str]) -> tuple[int, int]:
        """Where the first of these begins and the last one ends; tensors of a file do not overlap."""
        first, last = self.tensors[run[0]], self.tensors[run[-1]]
        return first.offset, last.offset + last.num_bytes

    def _read(self, out: torch.Tensor, offset: int) -> None:
        """Fill out: [n] uint8 with the bytes from `offset` on."""
        target = memoryview(out.numpy())
        self._reader.read_pieces(len(target), lambda first, end: self._read_piece(target[first:end], offset + first))

    def _read_piece(self, rest: memoryview, offset: int) -> None:
        """The same, of a part of it, perhaps in another thread."""
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                while len(rest):
                    count = file.readinto(rest)
                    if not count:
                        break
                    rest = rest[count:]
                # Compared after reading: if it holds now, what was read belongs to the header that was checked.
                changed = len(rest) > 0 or _state(os.fstat(file.fileno())) != self._state
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if changed:
            raise CheckpointError(f"{self.path} has changed while it was being read: {self._again}")


def printable(name: object) -> str:
    """A name from a file as messages show it: on one line, printable, at most 120 characters."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else text[:117] + "..."


def _state(status: os.stat_result) -> tuple[int, int]:
    """What shows whether a file has changed: its size, and when it was last written."""
    return status.st_size, status.st_mtime_ns


def _refuse_irregular(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # opening a pipe or a device may never end
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise CheckpointError(f"{path} is {kind}: a safetensors file is expected under this name")


def _refuse_pointer(file: BinaryIO, path: Path) -> None:
    if file.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    file.seek(0)
