"""The file of a saved cache: safetensors, in one canonical form, so that any byte that changes is noticed.

    header    __metadata__: format, description (JSON), sha256 of the description and the token ids, sha256 of the pages
    values    token_ids  [num_tokens] int32
              pages.0    [pages, bytes]  uint8: the memory of each page, as the pool lays it out
              pages.1    ...             a tensor for each place, where a model is split among several
              recent.0   [pages, bytes]  uint8: the pages in float16 of a format with a recent window

The pages can be many GiB, the rest is small: the head is read and checked on its own. Rows of the last page beyond the
last token are saved as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ropewalk.base.errors import CheckpointError, ConfigError, SavedCacheError
from ropewalk.base.json import shown
from ropewalk.files.replaced import replaced_file
from ropewalk.files.safetensors import SafetensorsFile
from ropewalk.files.safetensors_header import header_text
from ropewalk.model.saved.description import Description, read_description

FORMAT_NAME = "ropewalk-cache"
FORMAT_VERSION = 1
FORMAT = f"{FORMAT_NAME} {FORMAT_VERSION}"
TOKEN_IDS = "token_ids"
NO_DIGEST = "0" * 64
REMEDY = "save it again, or read the text anew"

Progress = Callable[[int, int], None]  # (steps done, steps in all)
TensorSpec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def write_file(
    path: Path, description: Description, token_ids: list[int], pages: Iterable[torch.Tensor], progress: Progress
) -> int:
    """Write a saved cache, whole or not at all; returns its size.

    pages: [bytes] uint8 each, in the order of `Description.parts`; copied to the CPU one by one. progress: counts them.

    Raises:
        OSError: as `replaced_file`.
    """
    ids = torch.tensor(token_ids, dtype=torch.int32)
    text = description.to_json()
    specs, total = _specs(description), _num_parts(description)
    metadata = {
        "format": FORMAT,
        "description": text,
        "description_sha256": _head_digest(text, ids),
        "pages_sha256": NO_DIGEST,
    }
    digest = sha256()
    with replaced_file(path) as file:
        file.write(header_text(specs, metadata))
        file.write(ids.numpy())
        for number, part in enumerate(pages, 1):
            values = part.cpu().numpy()
            digest.update(values)
            file.write(values)
            progress(number, total)
        size = file.tell()
        file.seek(0)  # the digest is known now, and takes as much room
        file.write(header_text(specs, metadata | {"pages_sha256": digest.hexdigest()}))
    return size


class SavedFile:
    """A saved cache whose head has been read and checked: everything but the pages.

    token_ids: of the positions, in order. num_bytes: of the file.
    """

    def __init__(self, path: Path) -> None:
        """Raises:
        SavedCacheError: missing, unreadable, cut short, damaged, of another version, or something else than a cache.
        """
        self.path = path
        with _told_as_saved_cache():
            self._file = SafetensorsFile(path, REMEDY, "try again")
        self.num_bytes = self._file.num_bytes
        metadata = self._checked_metadata()
        self._pages_digest = metadata["pages_sha256"]
        try:
            self.description = read_description(metadata["description"], str(path))
        except ConfigError as error:
            raise self._damaged(str(error)) from error
        specs = _specs(self.description)
        if self._file.header != header_text(specs, metadata):
            raise self._damaged("its header is not the one that its description asks for")
        ids = torch.empty(self.description.num_tokens, dtype=torch.int32)
        self._read_(TOKEN_IDS, 0, ids.view(torch.uint8))
        if _head_digest(metadata["description"], ids) != metadata["description_sha256"]:
            raise self._damaged("the checksum of its description and tokens is another one")
        self.token_ids: list[int] = ids.tolist()

    @property
    def num_steps(self) -> int:
        """Parts of pages in all: what progress counts, once to check them and once to read them."""
        return _num_parts(self.description)

    def check_pages(self, progress: Progress) -> None:
        """Read all pages and compare their checksum, one page in memory at a time. progress: counts parts of pages.

        Raises:
            SavedCacheError: it is another one, or the file cannot be read or has changed.
        """
        digest, done = sha256(), 0
        for name, count, size in self.description.parts:
            part = torch.empty(size, dtype=torch.uint8)
            for index in range(count):
                self.read_part_(name, index, part)
                digest.update(part.numpy())
                done += 1
                progress(done, self.num_steps)
        if digest.hexdigest() != self._pages_digest:
            raise self._damaged("the checksum of its pages is another one")

    def read_part_(self, name: str, index: int, out: torch.Tensor) -> None:
        """Fill out: [bytes] uint8, on the CPU, with a part of a page. name: one of `Description.parts`.

        Raises:
            SavedCacheError: the file cannot be read or has changed.
        """
        self._read_(name, index * len(out), out)

    def _read_(self, name: str, first: int, out: torch.Tensor) -> None:
        with _told_as_saved_cache():
            self._file.read_(name, first, out)

    def _checked_metadata(self) -> Mapping[str, str]:
        metadata: Any = self._file.metadata
        found = metadata.get("format") if isinstance(metadata, dict) else None
        if not isinstance(found, str) or not found.startswith(f"{FORMAT_NAME} "):
            raise SavedCacheError(
                f"{self.path} is not a saved cache (its format is {shown(found)}, {FORMAT!r} is accepted): give a "
                "file that ropewalk cache save or cache.save wrote"
            )
        if found != FORMAT:
            raise SavedCacheError(f"{self.path} has the format {shown(found)}, and {FORMAT!r} is accepted: {REMEDY}")
        names = ("format", "description", "description_sha256", "pages_sha256")
        if tuple(metadata) != names or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged("its header lacks something, or holds more than it should")
        return metadata

    def _damaged(self, what: str) -> SavedCacheError:
        return SavedCacheError(f"{self.path} is damaged ({what}): {REMEDY}")


def _specs(description: Description) -> list[TensorSpec]:
    """The tensors of the file, in their order."""
    parts = [(name, "U8", (count, size)) for name, count, size in description.parts]
    return [(TOKEN_IDS, "I32", (description.num_tokens,)), *parts]


def _num_parts(description: Description) -> int:
    return sum(count for _, count, _ in description.parts)


def _head_digest(description: str, token_ids: torch.Tensor) -> str:
    digest = sha256(description.encode("utf-8", "surrogatepass"))
    digest.update(token_ids.numpy())
    return digest.hexdigest()


@contextmanager
def _told_as_saved_cache() -> Iterator[None]:
    """Errors of reading, as errors of a saved cache."""
    try:
        yield
    except CheckpointError as error:
        raise SavedCacheError(str(error)) from error
