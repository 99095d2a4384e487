"""From a model folder to a Model that is ready to run.

    folder -> config, quantisation, RoPE -> list of tensors checked -> layer by layer: read, pack, drop what was read

Peak memory is therefore the packed weights plus one layer. Everything that can be refused is refused before the first
weight is read.

Files are read and never mapped. What a model keeps as it was stored (the embedding table, dense weights) lies in memory
of its own, so a file that is truncated, rewritten or deleted under a running server changes nothing there; one that
changes while it is being read is a CheckpointError. Loading takes as long as with a mapping (scripts/bench/memory.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ropewalk.backends.protocol import Backend
from ropewalk.backends.reference import ReferenceBackend
from ropewalk.base.errors import CheckpointError, ConfigError
from ropewalk.base.json import shown
from ropewalk.base.limits import MAX_SEQ_LEN, MAX_THREADS
from ropewalk.base.memory import format_bytes, return_freed_memory
from ropewalk.config.layer_order import LayerOrder
from ropewalk.config.model import ModelConfig
from ropewalk.config.quantisation import QuantConfig, load_quant_config
from ropewalk.families.tables import layer_prefix
from ropewalk.families.weights import check_tensors, read_embeddings, read_head, read_layer
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import DenseLinear
from ropewalk.model.cache import CACHE_DTYPES
from ropewalk.model.layers import PackedLayer, pack_layer
from ropewalk.model.model import Model, ModelLimits, ModelWeights
from ropewalk.model.plan import plan_loading

logger = logging.getLogger(__name__)

COMPUTE_MODES = ("int8", "exact")
BACKENDS = ("cpu", "reference")


def load_model(
    folder: str | Path,
    max_seq_len: int | None = None,
    max_input_len: int = 2048,
    compute: str = "int8",
    backend: str = "cpu",
    threads: int | None = None,
    isa: str | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    compress_pos_emb: float | None = None,
    alpha_value: float | None = None,
    rope_theta: float | None = None,
    cache_type: str = "fp16",
    device: str | torch.device | None = None,
    max_attention_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    layer_order: str | Sequence[int] | LayerOrder | None = None,
    recompute_n_layers: int | None = None,
    rewind_n_layers: int | None = None,
    second_folder: str | Path | None = None,
) -> Model:
    """Load the model in `folder` (config.json and safetensors; GPTQ or dense float weights).

    max_seq_len: longest sequence to be run (default: what config.json declares, or what an argument below
        makes the RoPE cover). More than the method covers logs a warning with the remedy.
    max_input_len: tokens per chunk of a long prompt; bounds scratch memory, never changes results.
    compute: "int8" (activations quantised in blocks of 32, integer products) or "exact" (float32 activations).
    backend: "cpu" (compiled kernels) or "reference" (plain torch, slow, any `device`).
    threads, isa: for "cpu": number of threads (default: all cores) and instruction set (default: the best there is).
    rope_scaling, compress_pos_emb, alpha_value, rope_theta: override what config.json says; see `rope.resolve_rope`.
    cache_type: "fp16" or "fp32", the dtype of cached keys and values.
    max_attention_size: accepted for compatibility with exllama, where it bounds the matrix of scores. Attention here is
        tiled and never forms that matrix, so it has no effect.
    layer_order: which layers to run, such as "0-15,8-23,16-31" or a list of numbers; see `layer_order.py`. Default:
        the key `layer_order` of config.json, else each layer once. Weights are shared, every use has its own cache.
    recompute_n_layers, rewind_n_layers: instead of an order: run so many layers, go back by so many, and so on.
    second_folder: a model of equal shapes whose layers an order names as "b:"; embeddings and head are the first's.
    progress: called with (steps done, steps in all) after every layer.

    Raises:
        ConfigError: an option or a key of a JSON file is wrong. CheckpointError: the weights are missing or damaged.
        UnsupportedError: an architecture or format that is not implemented. NativeError: no compiled core for "cpu".
    """
    _check_options(max_seq_len, max_input_len, max_attention_size, threads)
    _check_choice("compute", compute, COMPUTE_MODES)
    _check_choice("cache_type", cache_type, tuple(CACHE_DTYPES))
    ops = _make_backend(backend, compute, threads, isa, device)
    if not isinstance(folder, (str, Path)):
        raise ConfigError(f"the model folder must be a path, got {type(folder).__name__}")
    folder = Path(folder)
    rope_options = {
        "rope_scaling": rope_scaling,
        "compress_pos_emb": compress_pos_emb,
        "alpha_value": alpha_value,
        "rope_theta": rope_theta,
    }
    order_options = {
        "layer_order": layer_order,
        "recompute_n_layers": recompute_n_layers,
        "rewind_n_layers": rewind_n_layers,
    }
    plan = plan_loading(folder, max_seq_len, rope_options, order_options, second_folder)
    logger.info("%s", plan.rope.describe())
    limits = ModelLimits(plan.max_seq_len, max_input_len, cache_type)
    second = plan.second
    report = _step_counter(progress, plan.config.num_layers + (second.num_layers if second else 0) + 1)
    lent = () if second is None else _load_second_layers(Path(second_folder), second, ops, report)
    weights = _load_weights(folder, plan.config, plan.quant, ops, report)
    weights = replace(weights, layers=weights.layers + lent)
    return_freed_memory()
    model = Model(plan.config, plan.quant, plan.rope, ops, weights, limits, plan.order)
    logger.info("%s", _summary(model))
    return model


def _load_weights(
    folder: Path, config: ModelConfig, quant: QuantConfig | None, backend: Backend, report: Callable[[], None]
) -> ModelWeights:
    with _open_weights(folder, config, quant) as checkpoint:
        layers = _pack_layers(checkpoint, config, quant, backend, report)
        embeddings = read_embeddings(config, checkpoint)
        final_norm, head = read_head(config, quant, checkpoint, embeddings)
        tied = isinstance(head, DenseLinear) and head.weight.data_ptr() == embeddings.data_ptr()
        packed_head = backend.pack([head])
        report()
    device = backend.device
    return ModelWeights(embeddings.to(device), layers, final_norm.to(device), packed_head, tied)


def _load_second_layers(
    folder: Path, config: ModelConfig, backend: Backend, report: Callable[[], None]
) -> tuple[PackedLayer, ...]:
    quant = load_quant_config(folder, config.raw)
    with _open_weights(folder, config, quant) as checkpoint:
        return _pack_layers(checkpoint, config, quant, backend, report)


@contextmanager
def _open_weights(folder: Path, config: ModelConfig, quant: QuantConfig | None) -> Iterator[Checkpoint]:
    """The checkpoint with its tensors checked; what reading them can raise becomes a CheckpointError."""
    try:
        with Checkpoint(folder, quant.model_file_base_name if quant else None) as checkpoint:
            check_tensors(config, quant, checkpoint)
            yield checkpoint
    except MemoryError as error:
        raise CheckpointError(f"{folder}: not enough memory to load the weights") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: reading the weights failed: {error}") from error


def _pack_layers(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quant: QuantConfig | None,
    backend: Backend,
    report: Callable[[], None],
) -> tuple[PackedLayer, ...]:
    layers = []
    for index in range(config.num_layers):
        checkpoint.read_ahead(layer_prefix(index + 1))
        layers.append(pack_layer(backend, config, index, read_layer(config, quant, checkpoint, index)))
        report()
    return tuple(layers)


def _step_counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    """A function that reports one more step of `total` as done."""
    steps = count(1)
    return lambda: None if progress is None else progress(next(steps), total)


def _make_backend(
    name: str, compute: str, threads: int | None, isa: str | None, device: str | torch.device | None
) -> Backend:
    _check_choice("backend", name, BACKENDS)
    if name == "reference":
        for option, value in (("threads", threads), ("isa", isa)):
            if value is not None:
                raise ConfigError(f'{option}={value!r} is an option of backend="cpu"; leave it out for "reference"')
        return ReferenceBackend(compute, _torch_device(device))
    if device is not None and str(device) != "cpu":
        raise ConfigError(f'device={str(device)!r} needs backend="reference"; backend="cpu" runs on the CPU only')
    from ropewalk.backends.cpu import CpuBackend  # not at the top: the reference runs without the compiled core

    return CpuBackend(compute=compute, isa=isa, threads=threads)


def _torch_device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device("cpu" if device is None else device)
        torch.empty(1, device=chosen).cpu()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        # torch answers an unknown name, an absent device and a build without it each in its own way
        raise ConfigError(f"device={device!r} cannot be used here: {error}") from error
    return chosen


def _summary(model: Model) -> str:
    kind = "dense weights" if model.quant is None else f"GPTQ {model.quant.default.bits}-bit weights"
    plain = model.layer_order.is_plain(model.config.num_layers)
    order = "" if plain else f" run as {shown(str(model.layer_order))} ({len(model.instances)})"
    cache_size = format_bytes(model.cache_bytes(model.max_seq_len))
    return (
        f"{model.config.family}, {model.config.num_layers} layers{order}, {kind}: {format_bytes(model.weight_bytes)}; "
        f"{model.cache_type} cache of {model.max_seq_len} positions: {cache_size}; "
        f"backend {model.backend.name}, compute {model.backend.compute}"
    )


def _check_options(
    max_seq_len: int | None, max_input_len: int, max_attention_size: int | None, threads: int | None
) -> None:
    optional = {"max_seq_len": max_seq_len, "max_attention_size": max_attention_size, "threads": threads}
    given = {"max_input_len": max_input_len, **{name: value for name, value in optional.items() if value is not None}}
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a positive integer, got {value!r}")
    if max_seq_len is not None and max_seq_len > MAX_SEQ_LEN:
        raise ConfigError(f"max_seq_len must be at most {MAX_SEQ_LEN}, got {max_seq_len}")
    if threads is not None and threads > MAX_THREADS:
        raise ConfigError(f"threads must be at most {MAX_THREADS}, got {threads}")


def _check_choice(option: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ConfigError(f"{option} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
