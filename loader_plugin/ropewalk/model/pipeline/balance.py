"""How many layer instances each rank of a pipeline runs: as asked for, or so that all have as much to read.

A step reads the weights of its layers once; rank 0 reads the head besides. So the bytes of the slowest rank, which are
what the others wait for, are made as few as possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from ropewalk.base.errors import ConfigError
from ropewalk.config.instances import instances_of
from ropewalk.files.folder import Checkpoint
from ropewalk.model.backend_choice import arithmetic
from ropewalk.model.head import rounded_bits
from ropewalk.model.options import LoadOptions, parse_pipeline
from ropewalk.model.placement import layer_bytes
from ropewalk.model.plan import LoadPlan


def choose_counts(folder: Path, plan: LoadPlan, options: LoadOptions) -> list[int]:
    """Layer instances of each rank, in the order in which they run.

    Raises:
        ConfigError: there are more ranks than layer instances, or the numbers given are not those of the order.
    """
    asked = parse_pipeline(options.pipeline)
    indices = [use.weights_index for use in instances_of(plan.order, plan.config.num_layers)]
    if not isinstance(asked, int):
        if sum(asked) != len(indices):
            raise ConfigError(
                f"pipeline={options.pipeline!r} shares out {sum(asked)} layer instances, and the model runs "
                f"{len(indices)}: give numbers that add up to that, or only how many processes there are to be"
            )
        return list(asked)
    if asked > len(indices):
        raise ConfigError(
            f"pipeline={asked}: the model runs {len(indices)} layer instances, and each process needs one: give at "
            f"most {len(indices)}"
        )
    sizes = layer_bytes(folder, plan, options)
    return balanced([sizes[index] for index in indices], _head_bytes(folder, plan, options), asked)


def balanced(sizes: Sequence[int], first: int, num_ranks: int) -> list[int]:
    """Runs of neighbours of these sizes for so many ranks, whose largest sum is as small as can be.

    first: what rank 0 has besides; it may get none, and all others get at least one. Of equal choices, the one that
    gives later ranks more: rank 0 also chooses tokens.
    """
    total = len(sizes)
    sums = list(accumulate(sizes, initial=0))
    # least[end]: the largest sum of the ranks so far, which share out sizes[:end]; taken: how many the last of them has
    least: list[float] = [first + sums[end] for end in range(total + 1)]
    taken = [list(range(total + 1))]
    for rank in range(1, num_ranks):
        after, counts = [float("inf")] * (total + 1), [0] * (total + 1)
        for end in range(rank, total + 1):
            for count in range(1, end - rank + 2):
                largest = max(least[end - count], sums[end] - sums[end - count])
                if largest <= after[end]:
                    after[end], counts[end] = largest, count
        least = after
        taken.append(counts)
    found, end = [], total
    for counts in reversed(taken):
        found.append(counts[end])
        end -= counts[end]
    return found[::-1]


def _head_bytes(folder: Path, plan: LoadPlan, options: LoadOptions) -> int:
    """What a step reads of the head, roughly: as stored, or rounded if it is dense."""
    names = plan.config.table.names
    with Checkpoint(folder, plan.quant.model_file_base_name if plan.quant else None) as checkpoint:
        found = [name for name in checkpoint.names() if name.startswith(f"{names.head}.")]
        found = found or [name for name in checkpoint.names() if name == f"{names.embeddings}.weight"]
        is_dense = f"{names.head}.weight" in found or f"{names.embeddings}.weight" in found
        num_bytes = sum(checkpoint.info(name).num_bytes for name in found)
    bits = rounded_bits(options.head_bits, arithmetic(options)) if is_dense else None
    return num_bytes if bits is None else num_bytes * bits // 16
