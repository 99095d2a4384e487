"""A PEFT folder as plain matrices, checked against the model that they belong to.

    W' = W + scale * B A         A: [r, K], B: [N, r]      (Hu et al. 2021, arXiv:2106.09685)

For the embedding table A is [r, V] and B [C, r]. Spellings of several years of PEFT are read: names with and without
that of the adapter (`lora_A.default.weight`, `lora_A.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ropewalk.adapters.config import LoraConfig, read_lora_config
from ropewalk.adapters.files import read_adapter_tensors
from ropewalk.base.errors import CheckpointError, UnsupportedError
from ropewalk.config.model import ModelConfig
from ropewalk.families.family import Names
from ropewalk.families.tables import LinearEntry
from ropewalk.files.safetensors import printable
from ropewalk.files.weight_files import listed
from ropewalk.gptq.linear import require_finite
from ropewalk.weights.rows import row_order

EMBEDDINGS = "embeddings"  # of the model, in the digest of an adapter
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PREFIX = "base_model.model."
MATRIX = re.compile(r"(?P<module>.+)\.(?P<matrix>lora_A|lora_B)(?:\.[^.]+)?\.weight")
EMBEDDING_MATRIX = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<matrix>[AB])(?:\.[^.]+)?")
WHOLE = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.[^.]+)?|\.base_layer)?\.weight")
QUANTISED_BASE = re.compile(r".+\.base_layer\.(qweight|qzeros|scales|g_idx)")


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """One change: scale * B A. a: [r, K], b: [N, r]; float32, float16 or bfloat16, contiguous."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What one adapter changes.

    linears: by the name of the module ("model.layers.0.self_attn.q_proj", "lm_head"), output features in the order of
    the layer function (weights/rows.py). embeddings: a [r, V], b [C, r].
    whole: tables [V, C] that replace those of the model, by module (`modules_to_save`).
    """

    source: str
    linears: Mapping[str, LowRank]
    embeddings: LowRank | None
    whole: Mapping[str, torch.Tensor]
    rope_scaling: Mapping[str, Any] | None

    def digest(self) -> str:
        """Equal for adapters that change the same in the same way, whatever their names and folders."""
        found = sha256()
        embeddings = {} if self.embeddings is None else {EMBEDDINGS: self.embeddings}
        for module, low_rank in sorted({**self.linears, **embeddings}.items()):
            found.update(f"{module} {low_rank.scale!r} ".encode())
            for tensor in (low_rank.a, low_rank.b):
                _add_tensor_(found, tensor)
        for module, table in sorted(self.whole.items()):
            found.update(f"whole {module} ".encode())
            _add_tensor_(found, table)
        return found.hexdigest()

    @property
    def num_bytes(self) -> int:
        """Memory of all matrices."""
        low_ranks = [*self.linears.values(), *([] if self.embeddings is None else [self.embeddings])]
        tensors = [tensor for low_rank in low_ranks for tensor in (low_rank.a, low_rank.b)] + list(self.whole.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _add_tensor_(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())


@dataclass(slots=True)
class _Found:
    """The tensors of a file by their meaning, with their names in the file."""

    matrices: dict[str, dict[str, tuple[str, torch.Tensor]]] = field(default_factory=dict)  # module -> "A" or "B"
    whole: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)


def read_adapter(folder: Path, config: ModelConfig, embeddings: torch.Tensor) -> Adapter:
    """The LoRA in `folder`, for the model of `config`, whose embedding table is `embeddings` ([V, C]).

    Raises:
        CheckpointError: no adapter, a damaged file, or an adapter for another model: the tensor is named.
        ConfigError: adapter_config.json is wrong. UnsupportedError: a variant of LoRA that is not implemented.
    """
    lora = read_lora_config(folder)
    path, tensors = read_adapter_tensors(folder)
    found = _sorted_by_meaning(path, tensors, config.table.names)
    modules, embedded = _modules(config), config.table.names.embeddings
    _check_modules(path, lora, config, modules, found)
    low_ranks = {
        module: _low_rank(path, lora, module, modules[module], found.matrices[module], config)
        for module in modules
        if module in found.matrices
    }
    whole = _whole_tables(path, lora, config, embeddings, found)
    return Adapter(
        source=str(folder),
        linears={module: low_rank for module, low_rank in low_ranks.items() if module != embedded},
        embeddings=low_ranks.get(embedded),
        whole=whole,
        rope_scaling=lora.rope_scaling,
    )


def _sorted_by_meaning(path: Path, tensors: Mapping[str, torch.Tensor], names: Names) -> _Found:
    found = _Found()
    for name, tensor in tensors.items():
        plain = _without_prefix(name, names)
        matrix = MATRIX.fullmatch(plain) or EMBEDDING_MATRIX.fullmatch(plain)
        whole = WHOLE.fullmatch(plain)
        if ".lora_magnitude_vector" in plain:
            raise UnsupportedError(f"{path}: {printable(name)}: DoRA (weight-decomposed LoRA) is not implemented")
        if plain.endswith(".bias") or ".lora_bias" in plain:
            _require_zero_bias(path, name, tensor)
        elif matrix is not None:
            known = found.matrices.setdefault(matrix["module"], {})
            side = matrix["matrix"][-1]
            if side in known:
                raise CheckpointError(
                    f"{path} holds two adapters ({printable(known[side][0])} and {printable(name)}): keep one"
                )
            known[side] = (name, tensor)
        elif QUANTISED_BASE.fullmatch(plain):
            continue  # the weights of the model, saved along
        elif whole is not None and whole["module"] in (names.embeddings, names.head):
            found.whole[whole["module"]] = (name, tensor)
        else:
            raise UnsupportedError(
                f"{path}: {printable(name)} is not something that an adapter can change here: low-rank matrices of "
                f"linear layers and embeddings, and whole tables of {names.embeddings} and {names.head} "
                "(modules_to_save) are"
            )
    return found


def _without_prefix(name: str, names: Names) -> str:
    """The name within a causal language model; adapters of the decoder alone lack the `model.` before its parts."""
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    decoder, _, embeddings = names.embeddings.rpartition(".")
    return f"{decoder}.{name}" if name.startswith(("layers.", f"{embeddings}.")) else name


def _require_zero_bias(path: Path, name: str, tensor: torch.Tensor) -> None:
    # SuperHOT's adapters carry biases for every linear, all zero.
    if tensor.dtype not in FLOATS or bool(tensor.any()):
        raise UnsupportedError(
            f"{path}: {printable(name)} is not zero: adapters that change biases are not implemented, only those "
            'trained with bias="none"'
        )


def _modules(config: ModelConfig) -> dict[str, LinearEntry]:
    """Every module that an adapter can change, by its full name; the inputs of the embeddings are the vocabulary."""
    names, prefix = config.table.names, config.table.layer_prefix
    modules = {
        prefix(index) + entry.name: entry
        for index in range(config.num_layers)
        for entry in config.layer_table(index).linears
    }
    embeddings = LinearEntry("embeddings", names.embeddings, "vocab", "hidden")
    return modules | {names.embeddings: embeddings, names.head: LinearEntry("head", names.head, "hidden", "vocab")}


def _check_modules(
    path: Path, lora: LoraConfig, config: ModelConfig, modules: Mapping[str, LinearEntry], found: _Found
) -> None:
    """The file must hold both matrices of exactly the modules that the configuration names, all of this model."""
    _refuse_experts(path, config, found)
    unknown = [sides for module, sides in found.matrices.items() if module not in modules]
    if unknown:
        name = next(iter(unknown[0].values()))[0]
        raise CheckpointError(
            f"{path}: {printable(name)} is for a module that this model ({config.source}: {config.family}, "
            f"{config.num_layers} layers) does not have: the adapter was made for another model"
        )
    for module, sides in found.matrices.items():
        if set(sides) != {"A", "B"}:
            present = printable(next(iter(sides.values()))[0])
            raise CheckpointError(f"{path}: {present} has no counterpart: A and B are both needed for {module}")
        if not lora.changes(module):
            name = printable(sides["A"][0])
            raise CheckpointError(f"{path}: {name} is for a module that {lora.source} does not name")
    if lora.targets is not None:
        missing = [module for module in modules if lora.changes(module) and module not in found.matrices]
        if missing:
            raise CheckpointError(
                f"{path} lacks the matrices of {len(missing)} modules that {lora.source} names "
                f"({listed(missing, 3)}): it is incomplete, or made for another model"
            )
    tables = (config.table.names.embeddings, config.table.names.head)
    unsaved = [name for name in tables if lora.saves(name) and name not in found.whole]
    if unsaved:
        raise CheckpointError(f"{path} lacks the table of {unsaved[0]}, which modules_to_save of {lora.source} names")
    if not found.matrices and not found.whole:
        raise CheckpointError(f"{path} holds no matrices for any module of this model ({config.source})")


def _refuse_experts(path: Path, config: ModelConfig, found: _Found) -> None:
    """The router decides which rows an expert sees: a change of it would have to follow them."""
    for index in range(config.num_layers):
        entry = config.layer_table(index).experts
        if entry is None:
            continue
        block = config.table.layer_prefix(index) + entry.gate.partition(".{expert}")[0]
        for module, sides in found.matrices.items():
            if module.startswith(block):
                name = printable(next(iter(sides.values()))[0])
                raise UnsupportedError(
                    f"{path}: {name} is for an expert: adapters that change experts are not implemented, only those of "
                    "the linears that every token takes"
                )


def _low_rank(
    path: Path,
    lora: LoraConfig,
    module: str,
    entry: LinearEntry,
    sides: Mapping[str, tuple[str, torch.Tensor]],
    config: ModelConfig,
) -> LowRank:
    rank = lora.rank_of(module)
    in_features, out_features = config.sizes[entry.inputs], config.sizes[entry.outputs]
    wanted = {"A": (rank, in_features), "B": (out_features, rank)}
    matrices = {side: _checked(path, *sides[side], wanted[side], f"rank {rank} by {lora.source}") for side in "AB"}
    order = row_order(entry.rows, config, out_features)
    b = matrices["B"] if order is None else matrices["B"][order]
    return LowRank(matrices["A"], b, lora.scale_of(module))


def _whole_tables(
    path: Path, lora: LoraConfig, config: ModelConfig, embeddings: torch.Tensor, found: _Found
) -> dict[str, torch.Tensor]:
    """Tables that differ from those of the model. (PEFT also saves unchanged ones beside their matrices.)"""
    shape = (config.vocab_size, config.hidden_size)
    tables = {}
    for module, (name, tensor) in found.whole.items():
        table = _checked(path, name, tensor, shape, "the vocabulary and hidden size of this model")
        own = embeddings if module == config.table.names.embeddings or config.tie_word_embeddings else None
        if own is None or not torch.equal(table.float(), own.float().cpu()):
            tables[module] = table
    touched = found.matrices.keys() & {config.table.names.embeddings, config.table.names.head}
    if config.tie_word_embeddings and (tables or (touched and lora.ties_embeddings)):
        name = found.whole[next(iter(tables))][0] if tables else "ensure_weight_tying"
        raise UnsupportedError(
            f"{path}: {printable(name)}: {config.source} ties the head to the embeddings, and adapters that replace "
            "one of them, or change both together, are not implemented for such models"
        )
    return tables


def _checked(path: Path, name: str, tensor: torch.Tensor, shape: tuple[int, ...], because: str) -> torch.Tensor:
    """The tensor, contiguous, after its dtype, shape and values have been checked."""
    if tensor.dtype not in FLOATS:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise CheckpointError(f"{path}: {printable(name)} is {tensor.dtype}, accepted: {accepted}")
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{path}: {printable(name)} has shape {list(tensor.shape)}, expected {list(shape)} ({because}): "
            "the adapter is for another model, or its configuration for another adapter"
        )
    require_finite(tensor, f"{path}: {printable(name)}")
    return tensor.detach().contiguous()
