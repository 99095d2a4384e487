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
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from ropewalk.backends.protocol import Backend, ExpertRoom
from ropewalk.base.errors import ConfigError
from ropewalk.base.json import shown
from ropewalk.base.memory import format_bytes, return_freed_memory
from ropewalk.config.model import ModelConfig
from ropewalk.config.quantisation import QuantConfig, load_quant_config
from ropewalk.containers.choice import container_of
from ropewalk.files.fingerprint import joint_fingerprint
from ropewalk.files.folder import Checkpoint
from ropewalk.files.local import local_folder
from ropewalk.gptq.linear import DenseLinear
from ropewalk.model.backend_choice import choose_backend
from ropewalk.model.backends import make_backend
from ropewalk.model.expert_room import choose_expert_room
from ropewalk.model.head import held_head
from ropewalk.model.layers import CopiedLayer, ElsewhereLayer, PackedLayer, elsewhere, pack_for_places
from ropewalk.model.model import Model, ModelLimits, ModelWeights
from ropewalk.model.opened import open_weights, opened
from ropewalk.model.options import LoadOptions, options_with, with_local_second, with_options
from ropewalk.model.pages import check_cache_memory, context_pages
from ropewalk.model.pipeline.start import start_pipeline
from ropewalk.model.placement import place_instances
from ropewalk.model.plan import LoadPlan, plan_loading
from ropewalk.weights.read import read_embeddings, read_head, read_layer

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
    room = _room_for_experts(folder, plan, options) if chosen.name == "cpu" else None
    if options.pipeline is not None:
        ops = start_pipeline(folder, plan, options, room)
    else:
        ops = make_backend(options, placement, room)
    try:
        return _load(folder, plan, options, ops, progress, chosen.why)
    except BaseException:
        ops.close()
        raise


load_model.__signature__ = with_options(load_model)  # for help() and editors: every option with its default


def _load(
    folder: Path,
    plan: LoadPlan,
    options: LoadOptions,
    ops: Backend,
    progress: Callable[[int, int], None] | None,
    why: str,
) -> Model:
    """The model on its backend. why: that backend was chosen."""
    logger.info("%s", plan.rope.describe())
    limits = ModelLimits(
        plan.max_seq_len, options.max_input_len, options.cache_format, options.cache_memory, options.rope_growth
    )
    context = context_pages(ops, plan.config, len(plan.order), limits)
    check_cache_memory(context, limits.cache_memory, ops)
    second = plan.second
    report = _step_counter(progress, plan.config.num_layers + (second.num_layers if second else 0) + 1)
    first = plan.config.num_layers
    lent, lent_samples = (), None
    if second is not None:
        lent, lent_samples = _load_second_layers(Path(options.second_folder), second, ops, report, first)
    weights, samples = _load_weights(folder, plan.config, plan.quant, ops, options.head_bits, report)
    theirs = ops.await_layers()
    lent_print = None if lent_samples is None else joint_fingerprint({**lent_samples, **theirs.second})
    fingerprint = joint_fingerprint({**samples, **theirs.first})
    weights = replace(weights, layers=weights.layers + lent, fingerprint=fingerprint, second_fingerprint=lent_print)
    return_freed_memory()
    model = Model(plan.config, plan.quant, plan.rope, ops, weights, limits, plan.order)
    logger.info("%s", _summary(model, why))
    return model


def _room_for_experts(folder: Path, plan: LoadPlan, options: LoadOptions) -> ExpertRoom | None:
    if plan.config.mixture is None:
        if options.expert_memory is not None:
            raise ConfigError("expert_memory is for mixtures of experts, and this model has no experts: leave it out")
        return None
    with opened(folder, plan.quant) as checkpoint:  # what is wrong with the tensors is told when they are read
        return choose_expert_room(checkpoint, plan, options)


def _load_weights(
    folder: Path,
    config: ModelConfig,
    quant: QuantConfig | None,
    backend: Backend,
    head_bits: str | int,
    report: Callable[[], None],
) -> tuple[ModelWeights, Mapping[str, bytes]]:
    """The weights, but for the fingerprint, and samples of the tensors that were read."""
    with open_weights(folder, config, quant, backend.file_reader) as checkpoint:
        embeddings = read_embeddings(config, checkpoint)
        final_norm, stored = read_head(config, quant, checkpoint, embeddings)
        head = held_head(stored, head_bits, backend.compute, backend.round_rows)
        tied = isinstance(head, DenseLinear) and head.weight.data_ptr() == embeddings.data_ptr()
        packed_head = backend.pack([head])
        chosen_bits = head_bits if isinstance(stored, DenseLinear) else None
        del stored, head  # before the layers are read: of the head, there are up to three copies meanwhile
        report()
        layers = _pack_layers(checkpoint, config, quant, backend, report)
        samples = checkpoint.samples
    device = backend.device
    moved = {name: part.to(device) for name, part in final_norm.items()}
    return ModelWeights(embeddings.to(device), layers, moved, packed_head, tied, chosen_bits, ""), samples


def _load_second_layers(
    folder: Path, config: ModelConfig, backend: Backend, report: Callable[[], None], first: int
) -> tuple[tuple[PackedLayer | CopiedLayer | ElsewhereLayer, ...], Mapping[str, bytes]]:
    """The layers, and samples of their tensors."""
    quant = load_quant_config(folder, config.raw)
    with open_weights(folder, config, quant, backend.file_reader) as checkpoint:
        layers = _pack_layers(checkpoint, config, quant, backend, report, first)
        return layers, checkpoint.samples


def _pack_layers(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quant: QuantConfig | None,
    backend: Backend,
    report: Callable[[], None],
    first: int = 0,
) -> tuple[PackedLayer | CopiedLayer | ElsewhereLayer, ...]:
    layers = []
    for index in range(config.num_layers):
        if backend.places_of(first + index):
            checkpoint.read_ahead(config.table.layer_prefix(index + 1))
            layers.append(pack_for_places(backend, config, index, read_layer(config, quant, checkpoint, index), first))
        else:
            layers.append(elsewhere(backend, config, index, first))
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
