"""Which of a folder's files hold the model (docs/formats.md, "Weight files").

The index, else the base name in the quantisation config, else the usual names, else a complete set of shards, else the
only file; anything else is an error that lists the candidates. Only names and the index are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ropewalk.base.errors import CheckpointError, ConfigError, UnsupportedError
from ropewalk.base.json import read_json_object
from ropewalk.files.safetensors import printable

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

# Tried in this order after the index and the base name: the names that AutoGPTQ and GPTQModel, transformers, and
# KoboldAI (4bit-128g.safetensors) give.
USUAL_NAMES = (r"gptq_model-\d+bit-(-1|\d+)g", "model", r"\d+bit.*")

# Weight files of other formats, with advice.
OTHER_FORMATS = {
    (".pt", ".pth", ".bin", ".ckpt"): (
        "a pickled torch file, which is not read because loading one can run code: convert it with torch.load(path, "
        'map_location="cpu", weights_only=True) and safetensors.torch.save_file(state_dict, "model.safetensors")'
    ),
    (".gguf", ".ggml"): (
        "a llama.cpp file: get the GPTQ or the unquantised safetensors version of this model, or use llama.cpp"
    ),
}


def choose_files(folder: Path, base_name: str | None) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The files to read and, if there is an index, which tensor is in which file."""
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"model folder {folder} cannot be listed: {error.strerror or error}") from error
    return choose_among(folder, entries, base_name)


def choose_among(folder: Path, entries: list[Path], base_name: str | None) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The same for a list of entries of the folder, of which only an index needs to be there yet."""
    index = _choose_index(entries, base_name)
    if index is not None:
        return _read_index(index, entries)
    candidates = [path for path in entries if path.name.endswith(SUFFIX) and not path.name.startswith("adapter_")]
    if base_name is not None:
        named = [path for path in candidates if path.name == base_name + SUFFIX]
        if named:
            return (named[0],), {}
    for pattern in USUAL_NAMES:
        matching = [path for path in candidates if re.fullmatch(pattern + re.escape(SUFFIX), path.name)]
        if len(matching) == 1:
            return (matching[0],), {}
        if matching:
            raise _ambiguous(folder, matching)
    shards = _complete_shards(candidates)
    if shards or len(candidates) == 1:
        return tuple(shards or candidates), {}
    if candidates:
        raise _ambiguous(folder, candidates)
    raise _nothing_to_read(folder, entries)


def _choose_index(entries: list[Path], base_name: str | None) -> Path | None:
    indices = [path for path in entries if path.name.endswith(INDEX_SUFFIX)]
    for preferred in ([base_name] if base_name is not None else []) + ["model"]:
        for path in indices:
            if path.name == preferred + INDEX_SUFFIX:
                return path
    if len(indices) > 1:
        raise CheckpointError(
            f"{indices[0].parent} has {len(indices)} index files ({listed(indices)}): keep only the one of this model"
        )
    return indices[0] if indices else None


def _read_index(index: Path, entries: list[Path]) -> tuple[tuple[Path, ...], dict[str, str]]:
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object that maps tensor names to files")
    for name, file in weight_map.items():
        # A bare file name: an index must not lead out of its folder.
        if not isinstance(file, str) or not file.endswith(SUFFIX) or re.search(r"[/\\\0]", file):
            raise CheckpointError(
                f"{index}: tensor {printable(name)} is mapped to {file!r:.80}, accepted is the name of a "
                f"{SUFFIX} file in the same folder"
            )
    files = sorted(set(weight_map.values()))
    present = {path.name for path in entries}
    missing = [file for file in files if file not in present]
    if missing:
        others = [path for path in entries if path.name.endswith(SUFFIX) and path.name not in files]
        advice = f"if the model is in {listed(others)}, delete the index" if others else "finish the download"
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(files)} files are missing ({listed(missing)}): {advice}"
        )
    return tuple(index.parent / file for file in files), weight_map


def _complete_shards(candidates: list[Path]) -> list[Path]:
    """All candidates if they are the shards of one model without its index, else nothing."""
    matches = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", path.name) for path in candidates]
    if not matches or not all(matches):
        return []
    if len({(match[1], match[3]) for match in matches}) > 1:
        return []
    numbers, total = {int(match[2]) for match in matches}, int(matches[0][3])
    if total != len(candidates) or numbers != set(range(1, total + 1)):
        raise CheckpointError(
            f"{candidates[0].parent} has {len(candidates)} of {total} shards ({listed(candidates)}): "
            "finish the download"
        )
    return candidates


def _ambiguous(folder: Path, candidates: list[Path]) -> CheckpointError:
    return CheckpointError(
        f"{folder} has {len(candidates)} weight files and nothing says which to read ({listed(candidates)}): keep "
        "one, or name it in quantize_config.json as model_file_base_name (without .safetensors)"
    )


def _nothing_to_read(folder: Path, entries: list[Path]) -> CheckpointError | UnsupportedError:
    for suffixes, advice in OTHER_FORMATS.items():
        files = [path for path in entries if path.suffix.lower() in suffixes]
        if files:
            return UnsupportedError(f"{folder} has no {SUFFIX} file; {listed(files[:3])} is {advice}")
    adapters = [path for path in entries if path.name.endswith(SUFFIX)]
    if adapters:
        return CheckpointError(
            f"{folder} holds only an adapter ({listed(adapters)}): give the folder of its base model"
        )
    return CheckpointError(f"{folder} has no {SUFFIX} file (found: {listed(entries) or 'nothing'})")


def listed(names: Iterable[Path | str], limit: int = 8) -> str:
    shown = [printable(name.name if isinstance(name, Path) else name) for name in names]
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "")
