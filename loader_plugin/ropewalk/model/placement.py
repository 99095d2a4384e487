"""Where layer instances run if not all run in one place: on which cards, and on the CPU.

    layer order, bytes of each layer, gpu_layers, gpu_split -> so many instances for each place, in the order they run

Instances are placed in the order in which they run, so the residual stream changes its place once for each place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ropewalk.base.errors import ConfigError
from ropewalk.base.memory import format_bytes
from ropewalk.config.instances import instances_of
from ropewalk.config.model import ModelConfig
from ropewalk.files.folder import Checkpoint
from ropewalk.model.options import LoadOptions, parse_split
from ropewalk.model.plan import LoadPlan

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Share:
    """So many layer instances on one place. device: of the GPU backend; None: the CPU backend."""

    device: str | None
    num_instances: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The places that run something, and which weights each instance runs (indices of `ModelWeights.layers`)."""

    shares: tuple[Share, ...]
    weights_indices: tuple[int, ...]


def place_instances(folder: Path, plan: LoadPlan, options: LoadOptions) -> Placement | None:
    """Places for the layer instances of a plan; None if all run in one.

    Raises:
        ConfigError: gpu_split has no room for all instances that are to run on cards.
    """
    if options.gpu_layers is None and options.gpu_split is None:
        return None
    indices = tuple(use.weights_index for use in instances_of(plan.order, plan.config.num_layers))
    on_cards = min(options.gpu_layers if options.gpu_layers is not None else len(indices), len(indices))
    if options.gpu_split is None:
        cards = [Share(str(options.device or "cuda"), on_cards)]
    else:
        sizes = layer_bytes(folder, plan, options)
        room = [share * GIB for share in parse_split(options.gpu_split)]
        counts = fill(indices[:on_cards], sizes, room)
        cards = [Share(_card(options, number), count) for number, count in enumerate(counts) if count]
    rest = len(indices) - on_cards
    shares = [*cards, *([Share(None, rest)] if rest else [])]
    return Placement(tuple(shares), indices) if len(shares) > 1 or options.gpu_split is not None else None


def fill(indices: Sequence[int], sizes: Sequence[int], room: Sequence[float]) -> list[int]:
    """How many of the instances, in order, each card takes.

    indices: the layer that each instance runs; sizes: bytes of each layer, which count once on a card; room: bytes.

    Raises:
        ConfigError: they do not all fit.
    """
    counts, card, held, used = [0] * len(room), 0, set(), 0
    for index in indices:
        while index not in held and used + sizes[index] > room[card]:
            card, held, used = card + 1, set(), 0
            if card == len(room):
                raise ConfigError(_no_room(sum(counts), indices, sizes, room))
        used += 0 if index in held else sizes[index]
        held.add(index)
        counts[card] += 1
    return counts


def _no_room(placed: int, indices: Sequence[int], sizes: Sequence[int], room: Sequence[float]) -> str:
    split = ",".join(f"{size / GIB:g}" for size in room)
    rest = f", or gpu_layers={placed}, so that the others run on the CPU" if placed else ""
    return (
        f"gpu_split={split!r} has room for {placed} of {len(indices)} layer instances, which take "
        f"{format_bytes(sum(sizes[index] for index in set(indices)))} of weights (each layer at most "
        f"{format_bytes(max(sizes))}): give more{rest}"
    )


def _card(options: LoadOptions, number: int) -> str:
    """The device of a share: cards are counted from 0; in Triton's interpreter each share is on the CPU."""
    return "cpu" if str(options.device) == "cpu" else f"cuda:{number}"


def layer_bytes(folder: Path, plan: LoadPlan, options: LoadOptions) -> list[int]:
    """Bytes of each layer as stored, those of the second model after the first's."""
    base_name = plan.quant.model_file_base_name if plan.quant else None
    sizes = _stored_bytes(folder, base_name, plan.config)
    if plan.second is not None:
        sizes += _stored_bytes(Path(str(options.second_folder)), None, plan.second)
    return sizes


def _stored_bytes(folder: Path, base_name: str | None, config: ModelConfig) -> list[int]:
    with Checkpoint(folder, base_name) as checkpoint:
        prefixes = [config.table.layer_prefix(index) for index in range(config.num_layers)]
        return [
            sum(checkpoint.info(name).num_bytes for name in checkpoint.names() if name.startswith(prefix))
            for prefix in prefixes
        ]
