"""A model folder's weights: names to tensors, each read on demand. Knows files and shards, not models."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

from ropewalk.base.errors import CheckpointError
from ropewalk.files.fingerprint import tensor_sample
from ropewalk.files.reader import FileReader
from ropewalk.files.safetensors import SafetensorsFile, printable
from ropewalk.files.safetensors_header import TensorInfo
from ropewalk.files.weight_files import choose_files, listed

logger = logging.getLogger(__name__)


class Checkpoint:
    """The tensors of a folder, by name. Use it as a context manager if you call `read_ahead`."""

    def __init__(self, folder: Path, base_name: str | None = None, reader: FileReader | None = None) -> None:
        """Chooses the files and reads their headers; no tensor is read.

        base_name: `model_file_base_name` of the quantisation config (a name without extension), used if it exists.
        reader: threads and memory for reading; default: one thread, and new memory for each tensor.

        Raises:
            CheckpointError: no file, an ambiguous choice, a missing shard, a damaged header.
            UnsupportedError: only weight files of other kinds (.pt, .bin, .gguf).
        """
        self.folder = Path(folder)
        self.files, shard_of = choose_files(self.folder, base_name)
        self._opened = {path.name: SafetensorsFile(path, reader=reader) for path in self.files}
        self._file_of = _locate(self._opened, shard_of)
        self._modules: dict[str, list[str]] = {}
        for name in self._file_of:
            self._modules.setdefault(name.rpartition(".")[0], []).append(name)
        self._warned: set[str] = set()
        self._samples: dict[str, bytes] = {}  # of the tensors that were read, for the fingerprint
        self._local = threading.local()  # tensors at hand
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ropewalk-read-ahead")
        self.total_bytes = sum(file.num_bytes for file in self._opened.values())

    def names(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of a tensor, from the header alone.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._file(name).tensors[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, on the CPU, in memory of its own: a second call reads it again.

        Raises:
            CheckpointError: no such tensor, a dtype that is not read, or a file that has changed.
        """
        found = self._at_hand().pop(name, None)
        found = self._file(name).tensor(name) if found is None else found
        if name not in self._samples:  # an expert that comes back has the values that it had
            self._samples[name] = tensor_sample(found)
        return found

    @contextmanager
    def at_hand(self, modules: Iterable[str]) -> Iterator[None]:
        """Within it, this thread finds the tensors of these modules in memory, each once.

        They are read here, those that lie side by side together: one read instead of a dozen for an expert.

        Raises:
            CheckpointError: as `tensor`.
        """
        hand = self._at_hand()
        for file, names in self._by_file(modules):
            hand.update(file.tensors_at_once(names))
        try:
            yield
        finally:
            hand.clear()

    def _at_hand(self) -> dict[str, torch.Tensor]:
        if not hasattr(self._local, "tensors"):
            self._local.tensors = {}
        return self._local.tensors

    def _by_file(self, modules: Iterable[str]) -> list[tuple[SafetensorsFile, list[str]]]:
        """The tensors of these modules, by the files that hold them."""
        found: dict[str, tuple[SafetensorsFile, list[str]]] = {}
        for name in (name for module in modules for name in self._modules.get(module, [])):
            file = self._file_of[name]
            found.setdefault(file.path.name, (file, []))[1].append(name)
        return list(found.values())

    @property
    def samples(self) -> Mapping[str, bytes]:
        """Of the tensors that have been read so far, for a fingerprint (see files/fingerprint.py)."""
        return dict(self._samples)

    def holds(self, name: str, tensor: torch.Tensor) -> bool:
        """True if the tensor stored under that name equals this one, bit for bit.

        Raises:
            CheckpointError: no such tensor, or a file that has changed.
        """
        return self._file(name).holds(name, tensor)

    def read_ahead(self, prefix: str) -> None:
        """Asks the system to fetch the tensors whose names begin with `prefix` from the disk, in the background.

        A hint, so that packing one layer overlaps with reading the next.
        """
        self._reader.submit(self.will_need, [module for module in self._modules if module.startswith(prefix)])

    def will_need(self, modules: Iterable[str]) -> None:
        """The same, at once, for the tensors of these modules."""
        for file, names in self._by_file(modules):
            file.will_need(names)

    def warn_once(self, kind: str, message: str) -> None:
        """Logs a warning, once per kind: a quirk of the writer shows in hundreds of modules."""
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        logger.log(level, "%s", message)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: there is no tensor {printable(name)} in {listed(self.files)}")
        return self._file_of[name]


def _locate(opened: dict[str, SafetensorsFile], shard_of: dict[str, str]) -> dict[str, SafetensorsFile]:
    """Which file holds each tensor. Tensors that the index does not mention count as well."""
    absent = [name for name, file in shard_of.items() if name not in opened[file].tensors]
    if absent:
        raise CheckpointError(
            f"{opened[shard_of[absent[0]]].path} does not match the index; missing there or in other shards: "
            f"{listed(absent)}. Index and shards belong to different models or downloads"
        )
    located: dict[str, SafetensorsFile] = {}
    for file in opened.values():
        for name in file.tensors:
            if name in located and name not in shard_of:
                raise CheckpointError(
                    f"tensor {printable(name)} is in both {located[name].path} and {file.path}: keep one of the files"
                )
            located[name] = file
    located.update({name: opened[file] for name, file in shard_of.items()})
    return located
