"""From a model folder to a Model that is ready to run.

    folder -> config, quantisation, RoPE -> list of tensors checked -> linear by linear: read, pack, drop what was read

Peak memory is therefore the packed weights plus one linear (and, before the layers, the head as stored and rounded).
Everything that can be refused is refused before the first weight is read.

Files are read, never mapped. What a model keeps as it was stored (the embedding table, dense weights) is copied into
memory, so truncating, rewriting or deleting a file does not affect a running server. If a file changes while it is
being read, loading raises CheckpointError.

Memory that is new to the process is what loading takes longest to get, so it is asked for once: a linear is read into
the memory of the one before it. From the page cache a 7B model loads in 1.45 times the time of reading its files into
new memory (scripts/bench/load.py, benchmarks/2026-11-22-load.txt). A copy of the packed weights beside the model would
have to be read into new memory as well, so it could save a third of that at most; there is none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from ropewalk.backends.protocol import Backend, ExpertRoom
from ropewalk.base.errors import CheckpointError, ConfigError
from ropewalk.base.json import shown
from ropewalk.base.memory import format_bytes, return_freed_memory
from ropewalk.config.model import ModelConfig
from ropewalk.config.quantisation import QuantConfig, load_quant_config
from ropewalk.containers.choice import container_of
from ropewalk.files.folder import Checkpoint
from ropewalk.files.local import local_folder
from ropewalk.files.reader import FileReader
from ropewalk.gptq.linear import DenseLinear
from ropewalk.model.backend_choice import choose_backend
from ropewalk.model.backends import make_backend
from ropewalk.model.expert_room import choose_expert_room
from ropewalk.model.head import held_head
from ropewalk.model.layers import CopiedLayer, PackedLayer, pack_for_places
from ropewalk.model.model import Model, ModelLimits, ModelWeights
from ropewalk.model.options import LoadOptions, options_with, with_local_second, with_options
from ropewalk.model.pages import check_cache_memory, context_pages
from ropewalk.model.placement import place_instances
from ropewalk.model.plan import LoadPlan, plan_loading
from ropewalk.weights.read import check_tensors, read_embeddings, read_head, read_layer

logger = logging.getLogger(__name__)


def load_model(
    folder: str | Path,
    max_seq_len: int | None = None,
    *,
    options: LoadOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    **keywords: Any,
) -> Model:
    """Load the model in `folder` (config.json and safetensors; GPTQ, AWQ, compressed-tensors or dense float weights).

    folder: a path, or the name of a model on the Hugging Face hub as a text, "OWNER/MODEL" or "OWNER/MODEL:REVISION",
        which is downloaded once (files/local.py).

    max_seq_len: longest sequence to be run (default: what config.json declares, or what an option makes the RoPE
        cover). Like every other field of `LoadOptions` it can be given here, as a keyword, or as part of `options`:
        load_model(folder, 16384, compute="exact", compress_pos_emb=4).
    options: all options in one record; keywords override single fields of it.
    progress: called with (steps done, steps in all) after every layer.

    Raises:
        ConfigError: an option, or a key in a JSON file, is wrong. CheckpointError: the weights are missing or damaged.
        UnsupportedError: an architecture or format that is not implemented. NativeError: no compiled core for "cpu".
        TypeError: a keyword that is not an option.
    """
    if max_seq_len is not None:
        keywords["max_seq_len"] = max_seq_len
    options = options_with(options, keywords)
    if not isinstance(folder, (str, Path)):
        raise ConfigError(f"the model folder must be a path, got {type(folder).__name__}")
    folder, options = local_folder(folder), with_local_second(options)
    chosen = choose_backend(options)
    plan = plan_loading(folder, options)
    placement = place_instances(folder, plan, options) if chosen.name == "gpu" else None
    ops = make_backend(options, placement, _room_for_experts(folder, plan, options) if chosen.name == "cpu" else None)
    logger.info("%s", plan.rope.describe())
    limits = ModelLimits(
        plan.max_seq_len, options.max_input_len, options.cache_format, options.cache_memory, options.rope_growth
    )
    context = context_pages(ops, plan.config, len(plan.order), limits)
    check_cache_memory(context, limits.cache_memory, ops)
    second = plan.second
    report = _step_counter(progress, plan.config.num_layers + (second.num_layers if second else 0) + 1)
    first = plan.config.num_layers
    lent, lent_print = (), None
    if second is not None:
        lent, lent_print = _load_second_layers(Path(options.second_folder), second, ops, report, first)
    weights = _load_weights(folder, plan.config, plan.quant, ops, options.head_bits, report)
    weights = replace(weights, layers=weights.layers + lent, second_fingerprint=lent_print)
    return_freed_memory()
    model = Model(plan.config, plan.quant, plan.rope, ops, weights, limits, plan.order)
    logger.info("%s", _summary(model, chosen.why))
    return model


load_model.__signature__ = with_options(load_model)  # for help() and editors: every option with its default


def _room_for_experts(folder: Path, plan: LoadPlan, options: LoadOptions) -> ExpertRoom | None:
    if plan.config.mixture is None:
        return None
    with _opened(folder, plan.quant) as checkpoint:  # what is wrong with the tensors is told when they are read
        return choose_expert_room(checkpoint, plan, options)


def _load_weights(
    folder: Path,
    config: ModelConfig,
    quant: QuantConfig | None,
    backend: Backend,
    head_bits: str | int,
    report: Callable[[], None],
) -> ModelWeights:
    with _open_weights(folder, config, quant, backend) as checkpoint:
        embeddings = read_embeddings(config, checkpoint)
        final_norm, stored = read_head(config, quant, checkpoint, embeddings)
        head = held_head(stored, head_bits, backend.compute, backend.round_rows)
        tied = isinstance(head, DenseLinear) and head.weight.data_ptr() == embeddings.data_ptr()
        packed_head = backend.pack([head])
        chosen_bits = head_bits if isinstance(stored, DenseLinear) else None
        del stored, head  # before the layers are read: of the head, there are up to three copies meanwhile
        report()
        layers = _pack_layers(checkpoint, config, quant, backend, report)
        fingerprint = checkpoint.fingerprint
    device = backend.device
    moved = {name: part.to(device) for name, part in final_norm.items()}
    return ModelWeights(embeddings.to(device), layers, moved, packed_head, tied, chosen_bits, fingerprint)


def _load_second_layers(
    folder: Path, config: ModelConfig, backend: Backend, report: Callable[[], None], first: int
) -> tuple[tuple[PackedLayer | CopiedLayer, ...], str]:
    """The layers, and the fingerprint of their tensors."""
    quant = load_quant_config(folder, config.raw)
    with _open_weights(folder, config, quant, backend) as checkpoint:
        layers = _pack_layers(checkpoint, config, quant, backend, report, first)
        return layers, checkpoint.fingerprint


@contextmanager
def _open_weights(
    folder: Path, config: ModelConfig, quant: QuantConfig | None, backend: Backend
) -> Iterator[Checkpoint]:
    """The checkpoint as `_opened` gives it, its tensors checked, for this backend to pack."""
    with _opened(folder, quant, backend.file_reader) as checkpoint:
        check_tensors(config, quant, checkpoint)
        yield checkpoint


@contextmanager
def _opened(folder: Path, quant: QuantConfig | None, reader: FileReader | None = None) -> Iterator[Checkpoint]:
    """The checkpoint; an OSError or MemoryError while it is in use becomes a CheckpointError."""
    try:
        with Checkpoint(folder, quant.model_file_base_name if quant else None, reader) as checkpoint:
            yield checkpoint
    except MemoryError as error:
        detail = f": {error}" if str(error) else ""  # of a card: which, and how much of it is free
        raise CheckpointError(f"{folder}: not enough memory to load the weights{detail}") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: reading the weights failed: {error}") from error


def _pack_layers(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quant: QuantConfig | None,
    backend: Backend,
    report: Callable[[], None],
    first: int = 0,
) -> tuple[PackedLayer | CopiedLayer, ...]:
    layers = []
    for index in range(config.num_layers):
        checkpoint.read_ahead(config.table.layer_prefix(index + 1))
        layers.append(pack_for_places(backend, config, index, read_layer(config, quant, checkpoint, index), first))
        report()
    return tuple(layers)


def _step_counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    """A function that reports one more of `total` steps as done."""
    steps = count(1)
    return lambda: None if progress is None else progress(next(steps), total)


def _summary(model: Model, why: str) -> str:
    quant = model.quant
    kind = "dense weights" if quant is None else f"{container_of(quant).title} {quant.default.bits}-bit weights"
    plain = model.layer_order.is_plain(model.config.num_layers)
    order = "" if plain else f" run as {shown(str(model.layer_order))} ({len(model.instances)})"
    cache_size = format_bytes(model.cache_bytes(model.max_seq_len))
    memory = format_bytes(model.cache_memory)
    return (
        f"{model.config.family}, {model.config.num_layers} layers{order}, {kind}: {format_bytes(model.weight_bytes)}; "
        f"{model.cache_type} cache of {model.max_seq_len} positions: {cache_size}, {memory} for all; "
        f"backend {model.backend.name}{f' ({why})' if why else ''}, compute {model.backend.compute}"
    )
