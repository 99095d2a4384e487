"""How much memory the experts of a mixture may take: all that they need, or what there is.

Experts that are not held are read from the files when a step needs them (backends/expert_memory.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ropewalk.backends.protocol import ExpertRoom
from ropewalk.base.errors import ConfigError
from ropewalk.base.memory import available_bytes, format_bytes
from ropewalk.containers.choice import container_of
from ropewalk.files.folder import Checkpoint
from ropewalk.model.options import LoadOptions
from ropewalk.model.plan import LoadPlan

logger = logging.getLogger(__name__)

# Of what is free beside the other weights. All experts are held if they leave a little for keys and values; if they do
# not, more is left to the system, which keeps files in memory: an expert that comes back from there need not come from
# the disk.
ALL_OF_FREE, PART_OF_FREE = 0.85, 0.6


def choose_expert_room(checkpoint: Checkpoint, plan: LoadPlan, options: LoadOptions) -> ExpertRoom | None:
    """None: all experts are held, because they fit or there are none.

    Raises:
        ConfigError: `expert_memory` does not hold the experts of one layer, which one step may need all of.
    """
    stored = dict(_expert_bytes(checkpoint, plan))
    total = sum(stored.values())
    free = available_bytes()
    given = options.expert_memory
    if not stored or (given is None and free is None):
        return None
    if given is None:
        assert free is not None
        beside = free - (checkpoint.total_bytes - total)
        given = total if total <= ALL_OF_FREE * beside else max(0, int(PART_OF_FREE * beside))
    if given >= total:
        return None
    largest = max(stored.values())
    if given < largest:
        raise ConfigError(
            f"expert_memory: {given} bytes ({format_bytes(given)}) do not hold the experts of one layer, which take "
            f"{largest} ({format_bytes(largest)}), and one step may need all of them"
        )
    logger.warning(
        "%s of the %s that the experts take are held in memory; the others are read from %s when they are needed",
        *(format_bytes(given), format_bytes(total), checkpoint.folder),
    )
    return ExpertRoom(given, given / total)


def _expert_bytes(checkpoint: Checkpoint, plan: LoadPlan) -> Iterator[tuple[int, int]]:
    """(layer, bytes of all of its experts when they are packed)."""
    config = plan.config
    for layer in range(config.num_layers):
        entry = config.layer_table(layer).experts
        if entry is None:
            continue
        prefix = config.table.layer_prefix(layer)
        names = (prefix + linear.name.format(expert=0) for linear in entry.linears)
        yield layer, config.sizes["experts"] * sum(_packed_bytes(checkpoint, plan, name) for name in names)


def _packed_bytes(checkpoint: Checkpoint, plan: LoadPlan, name: str) -> int:
    """Of one linear: codes of 5 to 7 bits take 8, others what they take in the files, like all the rest."""
    container = container_of(plan.quant)
    names = (f"{name}.{part}" for part in container.parts)
    stored = sum(checkpoint.info(tensor).num_bytes for tensor in names if tensor in checkpoint)
    settings = None if plan.quant is None else plan.quant.for_module(name)
    if settings is None or not container.holds(checkpoint, name):
        return stored
    codes = checkpoint.info(f"{name}.{container.codes}").num_bytes
    return stored - codes + codes * (settings.bits if settings.bits <= 4 else 8) // settings.bits
