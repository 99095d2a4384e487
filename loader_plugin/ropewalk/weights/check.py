"""Compares the names, shapes and dtypes in a checkpoint with what its model needs, before any weight is read.

All problems are collected into one error. Which container the quantised modules are in is declared (containers/);
whether a linear layer is quantised is decided by the file (`.qweight` or `.weight`, for example), not by the
configuration: writers differ in `dynamic` rules, skipped modules and lm_head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ropewalk.base.errors import CheckpointError
from ropewalk.config.model import ModelConfig
from ropewalk.config.settings import QuantConfig, QuantSettings
from ropewalk.containers.choice import container_of, refuse_other_containers
from ropewalk.families.tables import LinearEntry, NormEntry
from ropewalk.files.folder import Checkpoint
from ropewalk.files.foreign import refuse_foreign_layouts
from ropewalk.files.safetensors import printable
from ropewalk.gptq.shapes import FLOATS, tensor_problem

MAX_LISTED = 20

# Buffers that tools save along with the weights: they can be computed, or belong to one loader (TGI's scalars).
IGNORED = re.compile(
    r"gpt_neox\.layers\.\d+\.attention\.bias|"  # a causal mask
    r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.masked_bias|.*\.wf(_unsqueeze_.*)?|"
    r"gptq_(bits|groupsize|sym|desc_act)"
)


def check_tensors(config: ModelConfig, quant: QuantConfig | None, checkpoint: Checkpoint) -> None:
    """Checks every tensor of the model by its header.

    Raises:
        UnsupportedError: the tensors belong to another quantisation's layout.
        CheckpointError: tensors are missing, unexpected, or have the wrong shape or dtype; the message lists them.
    """
    refuse_other_containers(checkpoint.names(), quant, checkpoint.folder)
    kinds = config.table.kinds.values()
    own = {entry.name.rpartition(".")[2] for kind in kinds for entry in kind.linears}
    refuse_foreign_layouts(checkpoint.names(), checkpoint.folder, container_of(quant).parts, own)
    check = _Check(config, quant, checkpoint)
    check.run()
    if check.problems:
        listed = check.problems[:MAX_LISTED]
        more = len(check.problems) - len(listed)
        lines = [f"{checkpoint.folder}: the tensors do not fit {config.source}:", *listed]
        lines += [f"and {more} more"] if more else []
        raise CheckpointError("\n  ".join(lines) + check.likely_cause())


def settings_of(quant: QuantConfig | None, checkpoint: Checkpoint, name: str, in_features: int) -> QuantSettings:
    """How quantised module `name` is stored: as declared, or inferred from its shapes if nothing is declared for it.

    Raises:
        CheckpointError: nothing can be inferred from the shapes.
    """
    infer = container_of(quant).infer
    if quant is None or not quant.declared:
        return infer(checkpoint, name, in_features, None)
    settings = quant.for_module(name)
    # Quantised although the rules say dense (lm_head without its flag): it has the format of the other modules.
    return settings or infer(checkpoint, name, in_features, quant.default)


def norm_tensors(config: ModelConfig, prefix: str, entry: NormEntry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the tensors of one entry of a layer, whose names begin with `prefix`."""
    size = config.sizes
    shape = tuple(size[name] for name in entry.shape)
    if entry.by_head is None:
        yield prefix + entry.name, shape
        return
    for head in range(size[entry.by_head]):
        yield prefix + entry.name.format(head=head), shape


class _Check:
    """Collects the problems of one checkpoint."""

    def __init__(self, config: ModelConfig, quant: QuantConfig | None, checkpoint: Checkpoint) -> None:
        self.config, self.quant, self.checkpoint = config, quant, checkpoint
        self.container = container_of(quant)
        self.problems: list[str] = []
        self.known: set[str] = set()

    def run(self) -> None:
        size, family = self.config.sizes, self.config.table
        self._embeddings_and_head(size)
        self._norms("", family.names.final_norm)
        for index in range(self.config.num_layers):
            prefix, table = family.layer_prefix(index), self.config.layer_table(index)
            self._norms(prefix, table.norms)
            for linear in table.linears:
                has_bias = linear.bias in self.config.flags
                self._linear(prefix + linear.name, size[linear.inputs], size[linear.outputs], has_bias)
            if table.experts is not None:
                self._experts(prefix, table.experts.linears)
        unexpected = [
            name for name in self.checkpoint.names() if name not in self.known and not IGNORED.fullmatch(name)
        ]
        self.problems += [f"{printable(name)} is unexpected" for name in unexpected]

    def _experts(self, prefix: str, linears: tuple[LinearEntry, ...]) -> None:
        size = self.config.sizes
        for number in range(size["experts"]):
            for linear in linears:
                name = prefix + linear.name.format(expert=number)
                self._linear(name, size[linear.inputs], size[linear.outputs], has_bias=False)

    def _norms(self, prefix: str, entries: tuple[NormEntry, ...]) -> None:
        for entry in entries:
            for name, shape in norm_tensors(self.config, prefix, entry):
                self._floats(name, shape)

    def likely_cause(self) -> str:
        """What the names suggest, for the end of the message."""
        layers = [re.match(r"(.*?)layers\.(\d+)\.", name) for name in self.checkpoint.names()]
        prefixes = sorted({match[1] for match in layers if match})
        expected = self.config.table.names.layers.removesuffix("layers.")
        if prefixes and expected not in prefixes:
            return (
                f"\nThe names begin with {printable(prefixes[0])!r} instead of {expected!r}: not a plain language model"
            )
        found = max((int(match[2]) + 1 for match in layers if match and match[1] == expected), default=0)
        if found != self.config.num_layers:
            return f"\nThe files hold {found} layers, num_hidden_layers is {self.config.num_layers}"
        return "\nLikely an incomplete download, or a config.json of another model"

    def _embeddings_and_head(self, size: dict[str, int]) -> None:
        names, tied = self.config.table.names, self.config.tie_word_embeddings
        head_stored = f"{names.head}.weight" in self.checkpoint or self.container.holds(self.checkpoint, names.head)
        embeddings = f"{names.embeddings}.weight"
        if not (tied and embeddings not in self.checkpoint and f"{names.head}.weight" in self.checkpoint):
            self._floats(embeddings, (size["vocab"], size["hidden"]))
        if head_stored or not tied:
            self._linear(names.head, size["hidden"], size["vocab"], has_bias=False)

    def _linear(self, name: str, in_features: int, out_features: int, has_bias: bool) -> None:
        checkpoint = self.checkpoint
        self.known.update(f"{name}.{part}" for part in self.container.parts)
        quantised, dense = self.container.holds(checkpoint, name), f"{name}.weight" in checkpoint
        if quantised and dense:
            self.problems.append(f"{name} is stored twice, quantised (.{self.container.codes}) and dense (.weight)")
        elif quantised:
            self._quantised(name, in_features, out_features)
        elif dense:
            self._floats(f"{name}.weight", (out_features, in_features))
            if f"{name}.bias" in checkpoint:
                self._floats(f"{name}.bias", (out_features,))
        else:
            self.problems.append(f"{name}: both .{self.container.codes} and .weight are missing")
        if has_bias and (quantised or dense) and f"{name}.bias" not in checkpoint:
            self.problems.append(f"{name}.bias is missing: the configuration declares one")

    def _quantised(self, name: str, in_features: int, out_features: int) -> None:
        try:
            settings = settings_of(self.quant, self.checkpoint, name, in_features)
        except CheckpointError as error:
            self.problems.append(str(error))
            return
        self.problems += self.container.problems(self.checkpoint, name, in_features, out_features, settings)

    def _floats(self, name: str, shape: tuple[int, ...]) -> None:
        self.known.add(name)
        problem = f"{name} is missing"
        if name in self.checkpoint:
            problem = tensor_problem(self.checkpoint, name, shape, FLOATS)
        if problem:
            self.problems.append(problem)
