"""What a rank after rank 0 reads: its own layers, and nothing else of the files but their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ropewalk.backends.pipeline.loaded import LoadedLayers, Report
from ropewalk.backends.pipeline.messages import Load
from ropewalk.backends.protocol import ExpertRoom, OnePlace
from ropewalk.base.memory import return_freed_memory
from ropewalk.config.model import load_model_config
from ropewalk.config.quantisation import load_quant_config
from ropewalk.model.backends import make_backend
from ropewalk.model.layers import PackedLayer, pack_layer
from ropewalk.model.opened import open_weights
from ropewalk.model.options import LoadOptions
from ropewalk.model.pipeline.machine import Seat, threads_of
from ropewalk.weights.read import read_layer


def load_share(message: Load, seat: Seat) -> LoadedLayers:
    """The layers that the message gives to the rank of this seat.

    Raises:
        RopewalkError: as `load_model`.
    """
    indices = message.layers[seat.rank]
    num_layers = load_model_config(Path(message.folder)).num_layers
    backend = make_backend(_options(message, seat), None, _expert_room(message, len(indices)))
    layers, samples = _read(Path(message.folder), backend, [index for index in indices if index < num_layers], 0)
    second: Mapping[str, bytes] = {}
    lent = [index - num_layers for index in indices if index >= num_layers]
    if lent:
        more, second = _read(Path(message.second_folder), backend, lent, num_layers)
        layers |= more
    return_freed_memory()
    report = Report(
        message.names[seat.rank],
        sum(layer.num_bytes for layer in layers.values()),
        {name: sample.hex() for name, sample in samples.items()},
        {name: sample.hex() for name, sample in second.items()},
        backend.arithmetic,
    )
    return LoadedLayers(backend, {index: layer.compiled for index, layer in layers.items()}, report)


def _read(
    folder: Path, backend: OnePlace, indices: Sequence[int], first: int
) -> tuple[dict[int, PackedLayer], Mapping[str, bytes]]:
    """Layers of one model, and samples of their tensors. first: the index of its first layer among all."""
    config = load_model_config(folder)
    quant = load_quant_config(folder, config.raw)
    layers = {}
    with open_weights(folder, config, quant, backend.file_reader) as checkpoint:
        for index, after in zip(indices, [*indices[1:], None], strict=True):
            if after is not None:
                checkpoint.read_ahead(config.table.layer_prefix(after))
            layers[first + index] = pack_layer(backend, config, index, read_layer(config, quant, checkpoint, index))
        return layers, checkpoint.samples


def _options(message: Load, seat: Seat) -> LoadOptions:
    options = LoadOptions(backend=message.backend, compute=message.compute)
    if message.backend == "cpu":
        return replace(options, isa=message.isa or None, threads=threads_of(message.threads or None, seat))
    return replace(options, device=message.device or (f"cuda:{seat.local_rank}" if message.backend == "gpu" else None))


def _expert_room(message: Load, num_layers: int) -> ExpertRoom | None:
    """Of the memory for all experts, the part that falls to so many layers."""
    if message.expert_bytes < 0:
        return None
    total = sum(len(indices) for indices in message.layers)
    return ExpertRoom(message.expert_bytes * num_layers // total, message.expert_part)
