"""What loading a folder would give, from configuration files and tensor headers alone: no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ropewalk.base.memory import format_bytes
from ropewalk.config.cache_format import CacheFormat
from ropewalk.config.model import ModelConfig
from ropewalk.config.quantisation import QuantConfig, QuantSettings, load_quant_config
from ropewalk.containers.choice import container_of
from ropewalk.files.folder import Checkpoint
from ropewalk.files.local import Described, described_model
from ropewalk.model.backend_choice import arithmetic
from ropewalk.model.head import can_round, rounded_bits, rounded_bytes
from ropewalk.model.options import LoadOptions, options_with
from ropewalk.model.pages import planned_bytes
from ropewalk.model.plan import LoadPlan, plan_loading
from ropewalk.weights.check import check_tensors, settings_of

CACHE_LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a model folder. Sizes in bytes; `linears` counts them by storage, "4-bit, groups of 128" or "dense".

    folder: as it was given, or a name on the hub. downloaded: False if only the headers of its weights were.
    num_experts, experts_per_token: of each layer that is a mixture; 0: none is.
    act_order is what the files declare (desc_act); whether rows are out of order shows only in the weights.
    """

    folder: str
    downloaded: bool
    family: str
    num_layers: int
    layer_order: str
    num_instances: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_experts: int
    experts_per_token: int
    sliding_window: int | None
    sliding_layers: int
    linears: Mapping[str, int]
    format: str | None
    act_order: bool | None
    symmetric: bool | None
    quant_source: str | None
    rope: str
    rope_decided_by: str
    rope_covers: int | None
    max_seq_len: int
    files: Mapping[str, int]
    weight_bytes: int
    cache_type: str
    cache_bytes: Mapping[int, int]

    def to_json(self) -> dict[str, Any]:
        """Plain data; cache lengths become strings, since JSON has no other keys."""
        return {**asdict(self), "cache_bytes": {str(length): size for length, size in self.cache_bytes.items()}}

    def describe(self) -> str:
        """Several lines for people."""
        window = "" if self.sliding_window is None else f", sliding window {self.sliding_window}"
        if 0 < self.sliding_layers < self.num_layers:
            window += f" in {self.sliding_layers} layers"
        experts = f"; {self.experts_per_token} of {self.num_experts} experts a token" if self.num_experts else ""
        files = ", ".join(f"{name} ({format_bytes(size)})" for name, size in self.files.items())
        caches = "\n".join(
            f"  {length:>9,} positions  {format_bytes(size):>10}  with weights "
            f"{format_bytes(size + self.weight_bytes):>10}"
            for length, size in self.cache_bytes.items()
        )
        return "\n".join(
            [
                f"model      {self.folder}",
                f"family     {self.family}: {self.num_layers} layers, hidden {self.hidden_size}, inner "
                f"{self.intermediate_size}, vocabulary {self.vocab_size}" + experts,
                f"order      {self._order_line()}",
                f"attention  {self.num_heads} heads of {self.head_dim}, {self.num_kv_heads} for keys and values"
                + window,
                f"weights    {self._weights_line()}",
                f"files      {files}{'' if self.downloaded else '; only their headers were downloaded'}",
                f"context    {self.max_seq_len} positions",
                f"rope       {self.rope}",
                f"memory     weights {format_bytes(self.weight_bytes)}; {self.cache_type} cache of keys and values:",
                caches,
            ]
        )

    def _order_line(self) -> str:
        if self.num_instances == self.num_layers:
            return f"{self.layer_order}: {self.num_instances} layer instances"
        return (
            f"{self.layer_order}: {self.num_instances} layer instances; the weights stay as they are, the cache is "
            f"{self.num_instances / self.num_layers:.2f} times that of {self.num_layers} layers"
        )

    def _weights_line(self) -> str:
        linears = ", ".join(f"{count} linears {kind}" for kind, count in self.linears.items())
        if self.format is None:
            return linears
        order = "act-order" if self.act_order else "rows in order"
        zeros = "symmetric" if self.symmetric else "asymmetric"
        return f"{linears}; format {self.format}, {order}, {zeros} ({self.quant_source})"


def model_info(
    folder: str | Path, max_seq_len: int | None = None, *, options: LoadOptions | None = None, **keywords: Any
) -> ModelInfo:
    """What `load_model` with these arguments would load. Of a name on the hub, no weight is downloaded.

    Raises:
        ConfigError, CheckpointError, UnsupportedError, TypeError: as `load_model`, for everything that is found before
            weights are read.
    """
    if max_seq_len is not None:
        keywords["max_seq_len"] = max_seq_len
    options = options_with(options, keywords)
    with ExitStack() as opened:
        model = opened.enter_context(described_model(folder))
        more_bytes = 0  # than the folder's own files hold
        if options.second_folder is None:
            plan = plan_loading(model.folder, options)
        else:
            second = opened.enter_context(described_model(options.second_folder))
            plan = plan_loading(model.folder, replace(options, second_folder=second.folder))
            more_bytes = 0 if plan.second is None else _layer_bytes(second, plan.second)
        quant = plan.quant
        with Checkpoint(model.weights, quant.model_file_base_name if quant else None) as checkpoint:
            check_tensors(plan.config, quant, checkpoint)
            info = _info(model, plan, checkpoint, options.cache_format)
            more_bytes += _head_change(plan.config, quant, checkpoint, options)
    return replace(info, weight_bytes=info.weight_bytes + more_bytes)


def _head_change(config: ModelConfig, quant: QuantConfig | None, checkpoint: Checkpoint, options: LoadOptions) -> int:
    """By how many bytes the head is held in more than it is stored in."""
    head = config.table.names.head
    bits = rounded_bits(options.head_bits, arithmetic(options))
    if bits is None or container_of(quant).holds(checkpoint, head) or not can_round(config.hidden_size, bits):
        return 0
    is_tied = config.tie_word_embeddings or f"{head}.weight" not in checkpoint
    stored = 0 if is_tied else checkpoint.info(f"{head}.weight").num_bytes
    return rounded_bytes(config.vocab_size, config.hidden_size, bits) - stored


def _layer_bytes(second: Described, config: ModelConfig) -> int:
    """Size of the decoder layers of the second model, its tensors checked."""
    quant = load_quant_config(second.folder, config.raw)
    with Checkpoint(second.weights, quant.model_file_base_name if quant else None) as checkpoint:
        check_tensors(config, quant, checkpoint)
        prefixes = tuple(config.table.layer_prefix(index) for index in range(config.num_layers))
        return sum(checkpoint.info(name).num_bytes for name in checkpoint.names() if name.startswith(prefixes))


def _info(model: Described, plan: LoadPlan, checkpoint: Checkpoint, cache_format: CacheFormat) -> ModelInfo:
    config, quant, rope, order, context = plan.config, plan.quant, plan.rope, plan.order, plan.max_seq_len
    lengths = sorted({*(length for length in CACHE_LENGTHS if length < context), context})
    windows = [window for window in config.sliding_windows if window is not None]
    kinds, settings = _linears(config, quant, checkpoint)
    return ModelInfo(
        folder=model.title,
        downloaded=model.is_here,
        family=config.family,
        num_layers=config.num_layers,
        layer_order=str(order),
        num_instances=len(order),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_experts=0 if config.mixture is None else config.mixture.num_experts,
        experts_per_token=0 if config.mixture is None else config.mixture.top_k,
        sliding_window=windows[0] if windows else None,
        sliding_layers=len(windows),
        linears=kinds,
        format=None if settings is None else settings.format,
        act_order=None if settings is None else settings.desc_act,
        symmetric=None if settings is None else settings.sym,
        quant_source=None if settings is None else (quant.source if quant else "inferred from shapes"),
        rope=rope.describe(),
        rope_decided_by=rope.decided_by,
        rope_covers=rope.covers,
        max_seq_len=context,
        files={path.name: path.stat().st_size for path in checkpoint.files},
        weight_bytes=checkpoint.total_bytes,
        cache_type=str(cache_format),
        cache_bytes={n: planned_bytes(config, len(order), n, cache_format) for n in lengths},
    )


def _linears(
    config: ModelConfig, quant: QuantConfig | None, checkpoint: Checkpoint
) -> tuple[dict[str, int], QuantSettings | None]:
    """The number of linears by the way they are stored, and the settings of the first quantised one."""
    counts: Counter[str] = Counter()
    first = None
    for name, in_features in (*_layer_linears(config), (config.table.names.head, config.sizes["hidden"])):
        if container_of(quant).holds(checkpoint, name):
            settings = settings_of(quant, checkpoint, name, in_features)
            groups = "one group" if settings.group_size == -1 else f"groups of {settings.group_size}"
            counts[f"{settings.bits}-bit, {groups}"] += 1
            first = first or settings
        elif f"{name}.weight" in checkpoint:
            counts[f"dense {checkpoint.info(f'{name}.weight').dtype}"] += 1
    return dict(counts), first


def _layer_linears(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """(module, K) of every linear of the decoder layers, those of experts each."""
    size = config.sizes
    for index in range(config.num_layers):
        table, prefix = config.layer_table(index), config.table.layer_prefix(index)
        for entry in table.linears:
            yield prefix + entry.name, size[entry.inputs]
        for number in range(size["experts"] if table.experts else 0):
            for entry in table.experts.linears:
                yield prefix + entry.name.format(expert=number), size[entry.inputs]
