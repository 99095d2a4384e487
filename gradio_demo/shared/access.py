"""Which folders the page may open: the embedded model, those named at the start, what lies under --models, uploads.

Paths are compared after links are resolved, so that neither ".." nor a link leads out of the allowed roots. The files
of a folder are checked the same way: a folder under --models may hold a link to a file elsewhere.
"""

from __future__ import annotations

import filecmp
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ropewalk.base.errors import RequestError
from ropewalk.base.home import home_expanded
from ropewalk.base.memory import format_bytes
from ropewalk.files.embedded import demo_model_path
from ropewalk.files.local import local_folder
from ropewalk.files.names import cached_model, parse_name

EMBEDDED = "embedded model"
MAX_LISTED = 500
# Uploads fill the disk of the machine that the page runs on; larger models are copied there by hand.
MAX_UPLOAD_BYTES = 4 * 2**30
MAX_FOLDER_BYTES = 8 * 2**30
MAX_DEPTH = 3  # --models/publisher/model/adapter


@dataclass(frozen=True, slots=True)
class Access:
    """models: the directory of --models. granted: further folders, given on the command line. uploads: where the page
    keeps what people drop; anything below it came from them."""

    models: Path | None = None
    granted: tuple[Path, ...] = ()
    uploads: Path | None = None
    _embedded: Path = field(default_factory=demo_model_path)
    _fetched: dict[str, Path] = field(default_factory=dict)  # by their names on the hub

    def open(self, text: str, fetch: bool = False) -> Path:
        """The folder that a person means by a name of `model_names`, a path, a path below --models, or a name on the
        hub, which is downloaded if `fetch` says so.

        Raises:
            RequestError: it may not be read, or is not a folder; the message says what can be typed.
            CheckpointError, UnsupportedError, ConfigError: it is on no hub, or refused before it is downloaded.
        """
        if not isinstance(text, str):  # programs may send anything
            raise RequestError(f"the name of one model is needed, got {type(text).__name__}")
        name = text.strip()
        if name in ("", EMBEDDED):
            return self._embedded
        candidates = [home_expanded(name)]
        if self.models is not None and not candidates[0].is_absolute():
            candidates.insert(0, self.models / name)
        for candidate in candidates:
            folder = _resolved(candidate)
            if folder is not None and self._allows(folder):
                return self._checked(folder, name)
        if parse_name(name) is not None:
            return self._named(name, fetch)
        raise RequestError(f"{name}: {self._accepted()}")

    def must_be_fetched(self, text: str) -> bool:
        """True for a name on the hub that nobody has loaded here yet. What is no name is for `open` to refuse."""
        if not isinstance(text, str):
            return False
        name = text.strip()
        if parse_name(name) is None or name in self._fetched:
            return False
        below = None if self.models is None else _resolved(self.models / name)
        return below is None

    def _named(self, name: str, fetch: bool) -> Path:
        """The folder of a model on the hub. It is downloaded only when it is loaded, which not every visitor may."""
        if fetch:
            self._fetched[name] = local_folder(name)
        if name not in self._fetched:
            raise RequestError(f"{name} is no folder that may be read here; Load downloads it, if it is on the hub")
        return self._fetched[name]

    def model_names(self) -> list[str]:
        """What can be picked: the embedded model, folders of the command line, model folders under --models."""
        found = [] if self.models is None else _folders_with(self.models, "config.json")
        below = [str(folder.relative_to(self.models)) for folder in found]
        return [EMBEDDED, *map(str, self.granted), *below][:MAX_LISTED]

    def adapter_folders(self, model_folder: Path) -> dict[str, Path]:
        """LoRA folders by name: those that come with the model first, then those under --models."""
        found = _folders_with(model_folder, "adapter_config.json")
        if self.models is not None:
            found += [f for f in _folders_with(self.models, "adapter_config.json") if f not in found]
        named: dict[str, Path] = {}
        for folder in found:
            resolved = _resolved(folder)
            if resolved is not None and self._allows(resolved):
                name = folder.name if folder.name not in named else f"{folder.parent.name}/{folder.name}"
                named.setdefault(name, folder)
        return named

    def check_upload(self, path: Path) -> Path:
        """A file or folder that was dropped on the page.

        Raises:
            RequestError: it is not one of these, or larger than a file may be.
        """
        resolved = _resolved(path)
        if resolved is None or self.uploads is None or not _below(resolved, self.uploads.resolve()):
            raise RequestError(f"{path.name}: only files that were dropped on this page can be read")
        if resolved.is_file() and resolved.stat().st_size > MAX_UPLOAD_BYTES:
            raise RequestError(
                f"{path.name} is larger than the {format_bytes(MAX_UPLOAD_BYTES)} that a dropped file may have: "
                "copy it to the directory of --models"
            )
        return resolved

    def dropped_folder(self, files: Sequence[Path]) -> Path:
        """The model folder among dropped files: the one that holds config.json. Its files are brought together, since a
        page keeps each dropped file in a folder of its own.

        Raises:
            RequestError: nothing was dropped, or no config.json with it; two files of one name; too much.
        """
        checked = self._check_dropped(files)
        config = next((path for path in checked if path.name == "config.json"), None)
        if config is None:
            raise RequestError("no config.json is among the dropped files: drop the folder that holds it")
        if all(path.parent == config.parent for path in checked):
            return config.parent
        folder = Path(tempfile.mkdtemp(prefix="dropped-", dir=self.uploads))
        for path in checked:
            os.link(path, folder / path.name)
        return folder

    def _check_dropped(self, paths: Sequence[Path]) -> list[Path]:
        """Dropped files without duplicates. A browser tells their names, but not which folder each was in."""
        checked = list(dict.fromkeys(self.check_upload(path) for path in paths))
        size = sum(path.stat().st_size for path in checked)
        if size > MAX_FOLDER_BYTES:
            raise RequestError(
                f"the dropped files have {format_bytes(size)}, and at most {format_bytes(MAX_FOLDER_BYTES)} are "
                "accepted: copy the folder to the directory of --models"
            )
        by_name: dict[str, Path] = {}
        for path in checked:
            other = by_name.setdefault(path.name, path)
            if other is not path and not filecmp.cmp(other, path, shallow=False):
                raise RequestError(
                    f"two different files named {path.name} were dropped: drop the folder that holds config.json "
                    "without the folders inside it"
                )
        return list(by_name.values())

    def _roots(self) -> list[Path]:
        roots = [self._embedded, *self.granted, *(root for root in (self.models, self.uploads) if root is not None)]
        # A model in the hub's cache is a folder of links to files beside it.
        roots += [cached for cached in map(cached_model, self.granted) if cached is not None]
        return [root.resolve() for root in roots]

    def _allows(self, resolved: Path) -> bool:
        return any(_below(resolved, root) for root in self._roots())

    def _checked(self, folder: Path, name: str) -> Path:
        if not folder.is_dir():
            raise RequestError(f"{name} is a file: give the folder that holds config.json and the weights")
        for entry in folder.iterdir():
            target = _resolved(entry)
            if entry.is_symlink() and (target is None or not self._allows(target)):
                raise RequestError(f"{name}: {entry.name} is a link that leads out of the folders that may be read")
        return folder

    def _accepted(self) -> str:
        if self.models is None:
            return 'only the embedded model and dropped folders can be opened: start with "ropewalk demo --models DIR"'
        return f"there is no such folder under {self.models}, and others may not be read: pick one from the list"


def _resolved(path: Path) -> Path | None:
    """Without links; None if that is impossible (missing, a loop of links, a name that no file can have)."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        return None


def _below(path: Path, root: Path) -> bool:
    return path == root or root in path.parents


def _folders_with(root: Path, file_name: str, depth: int = MAX_DEPTH) -> list[Path]:
    """Folders at most `depth` levels below `root` that hold that file, sorted by name."""
    try:
        entries = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
    found = []
    for entry in entries:
        if (entry / file_name).is_file():
            found.append(entry)
        if depth > 1:
            found += _folders_with(entry, file_name, depth - 1)
    return found
