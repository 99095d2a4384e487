"""Writes a model with its layer order as a normal checkpoint folder, with repeated layers in full.

    folder, order -> JSON files (export/config.py) -> tensors renamed, shard by shard -> checked like any other model

A residual weight w other than 1 is folded into what a layer adds, (w W) x + w b, that is into o_proj and down_proj.
Dense weights are rounded once to their own dtype; the scales of GPTQ weights must stay exact, as with powers of two.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.base.json import shown
from ropewalk.base.memory import format_bytes
from ropewalk.config.layer_order import LayerOrder, choose_layer_order
from ropewalk.config.model import load_model_config
from ropewalk.config.quantisation import load_quant_config
from ropewalk.containers.choice import CODES_OF
from ropewalk.files.folder import Checkpoint
from ropewalk.files.local import local_folder
from ropewalk.model.export.config import SourceModel, exported_files, moved_linears
from ropewalk.model.plan import load_second_config
from ropewalk.weights.check import check_tensors

MAX_SHARD_BYTES = 2 * 2**30  # held in memory while it is written
FOLDED_PARTS = ("weight", "bias", "scales", "zeros", "weight_scale")  # the others are codes, zero points and groups
# Files for the text side of a model, and those that must stay with it. Cards and weights of other formats are left out.
COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"),
    *("generation_config.json", "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """What was written."""

    folder: Path
    layer_order: str
    num_layers: int
    num_bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Copy:
    """A tensor to be written: its new name, where it is, and what it is multiplied by. offset: see `NormEntry`."""

    name: str
    checkpoint: Checkpoint
    old_name: str
    weight: float = 1.0
    offset: float = 0.0

    @property
    def num_bytes(self) -> int:
        return self.checkpoint.info(self.old_name).num_bytes


def export_layers(
    folder: str | Path,
    out: str | Path,
    layer_order: str | Sequence[int] | LayerOrder | None = None,
    recompute_n_layers: int | None = None,
    rewind_n_layers: int | None = None,
    second_folder: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ExportedModel:
    """Write the model in `folder`, with the layers that the arguments of `load_model` of these names give, to `out`.

    out: a folder that does not exist or is empty; it appears only once it is complete.
    max_shard_bytes: a larger model is written in several files. progress: called with (tensors done, tensors in all).

    Raises:
        ConfigError, CheckpointError: as `load_model`; `out` is not empty or cannot be written.
        UnsupportedError: a weight that GPTQ scales cannot take exactly, or facts that one checkpoint cannot hold.
    """
    folder, out = local_folder(_path("the model folder", folder)), Path(_path("the folder to write", out))
    second_folder = None if second_folder is None else local_folder(second_folder)
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes must be a positive integer, got {max_shard_bytes!r}")
    config = load_model_config(folder)
    sources = {"a": SourceModel(folder, config, load_quant_config(folder, config.raw))}
    second_layers = None
    if second_folder is not None:
        second = load_second_config(second_folder, config)
        sources["b"] = SourceModel(Path(second_folder), second, load_quant_config(Path(second_folder), second.raw))
        second_layers = second.num_layers
    order = choose_layer_order(config, layer_order, recompute_n_layers, rewind_n_layers, second_layers)
    if not order.uses_second:
        sources.pop("b", None)
    with ExitStack() as stack:
        checkpoints = {name: stack.enter_context(_opened(source)) for name, source in sources.items()}
        _check_declared(sources, checkpoints)
        files = exported_files(sources, order)
        copies = _plan(sources, checkpoints, order)
        names = _write(out, folder, files, _shards(copies, max_shard_bytes), progress, sources, order)
    return ExportedModel(out, str(order), len(order), sum(copy.num_bytes for copy in copies), names)


def _path(what: str, value: Any) -> str | Path:
    if not isinstance(value, (str, Path)) or "\0" in str(value):
        raise ConfigError(f"{what} must be a path, got {shown(value)}")
    return value


def _opened(source: SourceModel) -> Checkpoint:
    checkpoint = Checkpoint(source.folder, source.quant.model_file_base_name if source.quant else None)
    check_tensors(source.config, source.quant, checkpoint)
    return checkpoint


def _check_declared(sources: Mapping[str, SourceModel], checkpoints: Mapping[str, Checkpoint]) -> None:
    """Refuse two models of which one declares its quantisation and the other leaves it to be inferred."""
    if "b" not in sources or (sources["a"].quant is None) == (sources["b"].quant is None):
        return
    for name, source in sources.items():
        if source.quant is None and any(tensor.endswith(".qweight") for tensor in checkpoints[name].names()):
            raise UnsupportedError(
                f"{source.folder} holds GPTQ weights without a declaration, unlike the other model: add its "
                "quantize_config.json"
            )


def _plan(sources: Mapping[str, SourceModel], checkpoints: Mapping[str, Checkpoint], order: LayerOrder) -> list[_Copy]:
    """Every tensor of the new checkpoint: what is outside the layers, then layer by layer."""
    first = checkpoints["a"]
    family = sources["a"].config.table
    layers = family.names.layers
    copies = [_Copy(name, first, name) for name in first.names() if not name.startswith(layers)]
    parts: dict[tuple[str, int], list[str]] = {}
    for source, checkpoint in checkpoints.items():
        for name in checkpoint.names():
            if name.startswith(layers):
                number, _, part = name.removeprefix(layers).partition(".")
                parts.setdefault((source, int(number)), []).append(part)
    for position, use in enumerate(order.uses):
        table = sources[use.source].config.layer_table(use.layer)
        offsets = {entry.name: entry.offset for entry in table.norms}
        for part in parts[use.source, use.layer]:
            module, _, kind = part.rpartition(".")
            weight = use.weight if module in table.adds and kind in FOLDED_PARTS else 1.0
            old_name, new_name = family.layer_prefix(use.layer) + part, family.layer_prefix(position) + part
            copies.append(_Copy(new_name, checkpoints[use.source], old_name, weight, offsets.get(part, 0.0)))
    return copies


def _shards(copies: list[_Copy], max_bytes: int) -> list[list[_Copy]]:
    shards: list[list[_Copy]] = [[]]
    size = 0
    for copy in copies:
        if shards[-1] and size + copy.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(copy)
        size += copy.num_bytes
    return shards


def _write(
    out: Path,
    folder: Path,
    files: Mapping[str, dict[str, Any]],
    shards: list[list[_Copy]],
    progress: Callable[[int, int], None] | None,
    sources: Mapping[str, SourceModel],
    order: LayerOrder,
) -> tuple[str, ...]:
    """Write everything to a folder of another name, check it, and rename it. Returns the names of the files."""
    out = out.absolute()
    partial = out.parent / (out.name + ".partial")
    try:
        _check_room(out, partial, sum(copy.num_bytes for shard in shards for copy in shard))
        partial.mkdir(parents=True)
        try:
            for name, value in files.items():
                (partial / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
            _write_shards(partial, shards, progress)
            for path in sorted({path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}):
                shutil.copyfile(path, partial / path.name)
            _check_result(partial, sources, order)
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return tuple(sorted(path.name for path in out.iterdir()))
    except (OSError, SafetensorError, MemoryError) as error:
        raise ConfigError(f"{out} cannot be written: {error or 'not enough memory for one of its files'}") from error


def _check_room(out: Path, partial: Path, num_bytes: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: give a folder that does not exist or is empty")
    if partial.exists():
        raise ConfigError(f"{partial} is there already, perhaps left by an export that was interrupted: delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes:
        raise ConfigError(f"{out}: the model takes {format_bytes(num_bytes)}, and {format_bytes(free)} are free there")


def _write_shards(folder: Path, shards: list[list[_Copy]], progress: Callable[[int, int], None] | None) -> None:
    total, done, weight_map = sum(map(len, shards)), 0, {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Memory of its own for each tensor: the format has no place for a tensor that is there under two names.
        tensors = {copy.name: _tensor(copy) for copy in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # safetensors lets only the owner read
        weight_map |= dict.fromkeys(tensors, name)
        done += len(shard)
        if progress is not None:
            progress(done, total)
    if len(shards) > 1:
        size = sum(copy.num_bytes for shard in shards for copy in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensor(copy: _Copy) -> torch.Tensor:
    """The tensor to be written, in memory of its own."""
    tensor = copy.checkpoint.tensor(copy.old_name)
    if copy.weight == 1.0:
        return tensor
    product = tensor.double().add_(copy.offset).mul_(copy.weight).sub_(copy.offset)
    folded = product.to(tensor.dtype)
    module = copy.old_name.rpartition(".")[0]
    quantised = any(f"{module}.{codes}" in copy.checkpoint for codes in CODES_OF)
    if not bool(torch.isfinite(folded).all()) or (quantised and not torch.equal(folded.double(), product)):
        raise UnsupportedError(
            f"{copy.old_name}: times {copy.weight:g} some of its values do not fit {str(tensor.dtype)[6:]}, so the "
            f"residual weight of this layer cannot be written into the checkpoint{_WEIGHT_ADVICE if quantised else ''}"
        )
    return folded.contiguous()


_WEIGHT_ADVICE = ": take a power of two near it, such as 0.5 or 0.25, or export the model before it is quantised"


def _check_result(folder: Path, sources: Mapping[str, SourceModel], order: LayerOrder) -> None:
    """Read the result like any model, and compare how each linear is declared."""
    config = load_model_config(folder)
    quant = load_quant_config(folder, config.raw)
    with Checkpoint(folder) as checkpoint:
        check_tensors(config, quant, checkpoint)
    for linear in moved_linears(sources, order):
        if (None if quant is None else quant.for_module(linear.name)) != linear.settings:
            raise UnsupportedError(
                f"{linear.old_name}: how it is quantised cannot be declared for {linear.name} of the new checkpoint"
            )
