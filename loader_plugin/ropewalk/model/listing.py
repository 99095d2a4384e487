"""The models in folders and in the hub's cache: what each is, and whether it would load. No weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ropewalk.base.errors import RopewalkError, brief
from ropewalk.containers.choice import format_title
from ropewalk.files.names import CACHED
from ropewalk.model.identify import identify
from ropewalk.model.info import ModelInfo, model_info

MAX_DEPTH = 4  # publisher/model/revision, and one more
WEIGHT_ENDINGS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ggml", ".onnx")


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One model. weights: "GPTQ 4-bit, groups of 128", or what it is if it does not load; reason: why it does not."""

    name: str
    folder: str
    loads: bool
    weights: str
    size_bytes: int
    family: str | None = None
    context: int | None = None
    runs_with: str | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def list_folder(root: Path) -> Iterator[ListedModel]:
    """The models in a folder and those below it, by their paths."""
    seen = set()  # links may lead to a folder again
    for folder in _model_folders(root, MAX_DEPTH):
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        name = str(folder.relative_to(root))
        yield listed_model(folder, root.name if name == "." else name)


def list_cache(cache: Path) -> Iterator[ListedModel]:
    """The models in the hub's cache, by the names that load them: OWNER/MODEL, OWNER/MODEL:REVISION."""
    for repo in _folders(cache):
        match = CACHED.fullmatch(repo.name)
        if match is None:
            continue
        name = f"{match[1]}/{match[2]}"
        revisions = _revisions(repo)
        for snapshot in _folders(repo / "snapshots"):
            revision = revisions.get(snapshot.name, snapshot.name)
            yield listed_model(snapshot, name if revision == "main" else f"{name}:{revision}")


def listed_model(folder: Path, name: str) -> ListedModel:
    """A line about one folder."""
    try:
        info = model_info(folder)
    except RopewalkError as error:
        known = identify(folder, error)
        return ListedModel(
            name=name,
            folder=str(folder),
            loads=False,
            weights="unknown" if known is None else known.what,
            size_bytes=_size(folder),
            family=None if known is None else known.family,
            runs_with=None if known is None else known.runs_with,
            reason=brief(error),
        )
    return ListedModel(name, str(folder), True, _weights(info), sum(info.files.values()), info.family, info.max_seq_len)


def _weights(info: ModelInfo) -> str:
    """The way that most linears are stored in, apart from those that are dense beside quantised ones."""
    quantised = {kind: count for kind, count in info.linears.items() if not kind.startswith("dense")}
    kinds = quantised or info.linears
    kind = max(kinds, key=lambda kind: kinds[kind]) if kinds else "no linears"
    return kind if info.format is None else f"{format_title(info.format, kind.partition('-')[0])} {kind}"


def _model_folders(root: Path, depth: int) -> Iterator[Path]:
    try:
        names = [entry.name for entry in root.iterdir() if entry.is_file()]
    except OSError:
        return
    weights = any(name.lower().endswith(WEIGHT_ENDINGS) and not name.startswith("adapter_") for name in names)
    if "config.json" in names or "model_index.json" in names or weights:
        yield root
    elif depth > 0:
        for folder in _folders(root):
            yield from _model_folders(folder, depth - 1)


def _folders(root: Path) -> list[Path]:
    try:
        found = (entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        return sorted(found, key=lambda folder: (folder.is_symlink(), folder))  # under its own name first
    except OSError:
        return []


def _revisions(repo: Path) -> dict[str, str]:
    """commit -> branch or tag, of those that were asked for by name; main comes first."""
    found: dict[str, str] = {}
    refs = repo / "refs"
    try:
        paths = sorted((path for path in refs.rglob("*") if path.is_file()), key=lambda path: path.name != "main")
        for path in paths:
            found.setdefault(path.read_text(encoding="utf-8").strip()[:64], str(path.relative_to(refs)))
    except (OSError, UnicodeDecodeError):
        pass
    return found


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    except OSError:
        return 0
