"""The folder of a model that is given as a text: a path as it is, a name on the hub once it is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ropewalk.files.names import parse_name


def local_folder(model: str | Path, weights: bool = True) -> Path:
    """The folder of a model given as a text: a path as it is, a name downloaded if need be. A `Path` is only a path.

    weights: False leaves the weight files of a name where they are.

    Raises:
        CheckpointError: there is no such name, it may not be read, or the hub cannot be asked and the cache lacks it.
        UnsupportedError, ConfigError: what its small files say is refused, before the weights are downloaded.
    """
    if not isinstance(model, str):
        return model
    name = parse_name(model)
    if name is None:
        return Path(model)
    from ropewalk.files.hub import fetch_model  # huggingface_hub takes a while to import, and few need it

    return fetch_model(name, weights)


@dataclass(frozen=True, slots=True)
class Described:
    """A model whose facts can be read. folder: its small files; weights: its weight files, or only their headers."""

    title: str
    folder: Path
    weights: Path

    @property
    def is_here(self) -> bool:
        """True if the weights could be read as well."""
        return self.weights == self.folder


@contextmanager
def described_model(model: str | Path) -> Iterator[Described]:
    """What describes a model: a path as it is; of a name only the small files and headers are downloaded.

    Raises:
        CheckpointError, UnsupportedError, ConfigError: as `local_folder`.
    """
    name = parse_name(model) if isinstance(model, str) else None
    if name is None:
        yield Described(str(model), Path(model), Path(model))
        return
    from ropewalk.files.remote_headers import fetch_headers  # as above

    with TemporaryDirectory(prefix="ropewalk-headers-") as scratch:
        yield Described(str(name), *fetch_headers(name, Path(scratch)))
