"""A model's weights from a checkpoint: embeddings, decoder layers one by one, and the head.

The names and sizes are data (families/), and weights/check.py has checked them before anything here runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ropewalk.config.model import ModelConfig
from ropewalk.config.settings import QuantConfig
from ropewalk.containers.choice import container_of
from ropewalk.families.tables import ExpertsEntry, LinearEntry, NormEntry
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import DenseLinear, Expert, GptqLinear, read_bias, require_finite
from ropewalk.weights.check import check_tensors, norm_tensors, settings_of
from ropewalk.weights.rows import ordered_linear, row_order

__all__ = ["LayerWeights", "check_tensors", "read_embeddings", "read_head", "read_layer"]

Linear = GptqLinear | DenseLinear


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer, by the fields of its tables (families/tables.py), ready for the layer function.

    norms: float32, of as many numbers as their sizes say. linears: each [K -> N]. Linears and experts are read one by
    one, when they are asked for.
    """

    norms: Mapping[str, torch.Tensor]
    linears: Mapping[str, Linear]
    experts: Mapping[str, Sequence[Expert]]


def read_embeddings(config: ModelConfig, checkpoint: Checkpoint) -> torch.Tensor:
    """The embedding table [V, C] as stored. A tied model may store it as the weight of its head only."""
    names = config.table.names
    if config.tie_word_embeddings and f"{names.embeddings}.weight" not in checkpoint:
        return checkpoint.tensor(f"{names.head}.weight")
    return checkpoint.tensor(f"{names.embeddings}.weight")


def read_layer(config: ModelConfig, quant: QuantConfig | None, checkpoint: Checkpoint, index: int) -> LayerWeights:
    """Layer `index` in the files: its norms are read here, its linears as they are asked for.

    Raises:
        CheckpointError: a norm that is not finite; of a linear, a scale or bias that is not, or a g_idx out of range.
    """
    table, prefix = config.layer_table(index), config.table.layer_prefix(index)
    norms = {entry.field: _read_norm(config, checkpoint, prefix, entry) for entry in table.norms}
    linears = StoredLinears(config, quant, checkpoint, prefix, table.linears)
    entry = table.experts
    experts = {} if entry is None else {entry.field: StoredExperts(config, quant, checkpoint, prefix, entry)}
    return LayerWeights(norms, linears, experts)


class StoredLinears(Mapping[str, Linear]):
    """The linears of a layer in their files: each is read when it is asked for, and anew each time."""

    def __init__(
        self,
        config: ModelConfig,
        quant: QuantConfig | None,
        checkpoint: Checkpoint,
        prefix: str,
        entries: Sequence[LinearEntry],
    ) -> None:
        self._config = config
        self._quant = quant
        self._checkpoint = checkpoint
        self._prefix = prefix
        self._entries = {entry.field: entry for entry in entries}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, field: str) -> Linear:
        """A linear by the field of its entry.

        Raises:
            CheckpointError: as `read_layer`.
        """
        entry, config = self._entries[field], self._config
        name, size = self._prefix + entry.name, config.sizes
        quantised = container_of(self._quant).holds(self._checkpoint, name)
        with self._checkpoint.at_hand([name] if quantised else []):  # dense ones are kept, in memory of their own
            linear = _read_linear(self._quant, self._checkpoint, name, size[entry.inputs], size[entry.outputs])
        if linear.bias is not None and entry.bias not in config.flags:
            self._checkpoint.warn_once(
                "undeclared bias",
                f"{name}.bias is not zero although {config.source} declares no bias there: it is used",
            )
        return ordered_linear(linear, row_order(entry.rows, config, size[entry.outputs]))


class StoredExperts(Sequence[Expert]):
    """The experts of a layer in their files: each is read when it is asked for, and anew each time."""

    def __init__(
        self,
        config: ModelConfig,
        quant: QuantConfig | None,
        checkpoint: Checkpoint,
        prefix: str,
        entry: ExpertsEntry,
    ) -> None:
        self._quant = quant
        self._checkpoint = checkpoint
        self._prefix = prefix
        self._linears = entry.linears
        self._sizes = config.sizes

    def __len__(self) -> int:
        return self._sizes["experts"]

    def __getitem__(self, number: int) -> Expert:
        """Expert `number`.

        Raises:
            CheckpointError: as `read_layer`, or a bias, which no expert has.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        with self._checkpoint.at_hand(self._names(number)):
            return Expert(*(self._read(linear, number) for linear in self._linears))

    def read_ahead(self, numbers: Sequence[int]) -> None:
        """Asks the system to fetch these experts from the disk."""
        self._checkpoint.will_need(name for number in numbers for name in self._names(number))

    def _names(self, number: int) -> list[str]:
        return [self._name(linear, number) for linear in self._linears]

    def _name(self, linear: LinearEntry, number: int) -> str:
        return self._prefix + linear.name.format(expert=number)

    def _read(self, linear: LinearEntry, number: int) -> Linear:
        sizes = self._sizes[linear.inputs], self._sizes[linear.outputs]
        return _read_linear(self._quant, self._checkpoint, self._name(linear, number), *sizes)


def read_head(
    config: ModelConfig, quant: QuantConfig | None, checkpoint: Checkpoint, embeddings: torch.Tensor
) -> tuple[Mapping[str, torch.Tensor], Linear]:
    """(final norm, "norm" and for some families "norm_bias": [C] float32, head [C -> V]). A tied head shares the tensor
    `embeddings`.

    A tied model whose file holds a different head uses that one, as transformers 5 does.
    """
    names = config.table.names
    final_norm = {entry.field: _read_norm(config, checkpoint, "", entry) for entry in names.final_norm}
    head, stored = names.head, f"{names.head}.weight"
    if config.tie_word_embeddings and not container_of(quant).holds(checkpoint, head):
        if stored not in checkpoint or checkpoint.holds(stored, embeddings):
            return final_norm, DenseLinear(head, embeddings, read_bias(checkpoint, head))
        checkpoint.warn_once(
            "tied head differs",
            f"{config.source} ties {head} to the embeddings, but {stored} differs from them: it is used as stored",
        )
    return final_norm, _read_linear(quant, checkpoint, head, config.hidden_size, config.vocab_size)


def _read_norm(config: ModelConfig, checkpoint: Checkpoint, prefix: str, entry: NormEntry) -> torch.Tensor:
    """[all sizes of the entry together] float32, as it multiplies or is added."""
    parts = []
    for name, _ in norm_tensors(config, prefix, entry):
        part = checkpoint.tensor(name).to(torch.float32, copy=True)
        require_finite(part, name)
        parts.append(part.flatten())
    weight = (parts[0] if len(parts) == 1 else torch.cat(parts)).add_(entry.offset)
    order = row_order(entry.rows, config, len(weight))
    return weight if order is None else weight[order]


def _read_linear(
    quant: QuantConfig | None, checkpoint: Checkpoint, name: str, in_features: int, out_features: int
) -> Linear:
    container = container_of(quant)
    if not container.holds(checkpoint, name):
        return DenseLinear(name, checkpoint.tensor(f"{name}.weight"), read_bias(checkpoint, name))
    settings = settings_of(quant, checkpoint, name, in_features)
    return container.read(checkpoint, name, in_features, out_features, settings)
