"""What a container of quantised weights is: the names of a module's tensors, how they are checked and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ropewalk.config.settings import QuantSettings
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import GptqLinear
from ropewalk.gptq.shapes import tensor_problem

# Of one part of a module: the dtypes that are accepted, and its shape.
Expected = tuple[tuple[str, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Container:
    """One way to store quantised linears.

    formats: what configurations call it, and what a line about a model does, {bits} for the bits of a code.
    codes: the part of a module's name whose presence says that it is quantised ("qweight").
    parts: all parts that a quantised module may have.
    infer: (checkpoint, module, K, template) -> its settings by the shapes alone.
    problems: (checkpoint, module, K, N, settings) -> a line for each tensor that is missing or wrong, by the headers.
    read: (checkpoint, module, K, N, settings) -> the linear in plain form.
    """

    title: str
    formats: Mapping[str, str]
    codes: str
    parts: tuple[str, ...]
    infer: Callable[[Checkpoint, str, int, QuantSettings | None], QuantSettings]
    problems: Callable[[Checkpoint, str, int, int, QuantSettings], list[str]]
    read: Callable[[Checkpoint, str, int, int, QuantSettings], GptqLinear]

    def holds(self, checkpoint: Checkpoint, name: str) -> bool:
        """True if module `name` is stored quantised."""
        return f"{name}.{self.codes}" in checkpoint


def part_problems(
    checkpoint: Checkpoint, name: str, expected: Mapping[str, Expected], optional: tuple[str, ...]
) -> list[str]:
    """A line for each part of module `name` that is missing or has the wrong shape or dtype."""
    problems: list[str | None] = []
    for part, (dtypes, shape) in expected.items():
        tensor = f"{name}.{part}"
        if tensor in checkpoint:
            problems.append(tensor_problem(checkpoint, tensor, shape, dtypes))
        elif part not in optional:
            problems.append(f"{tensor} is missing")
    return [problem for problem in problems if problem is not None]


def num_groups(in_features: int, group_size: int) -> int:
    """ceil(K / group_size); -1: one group."""
    return 1 if group_size == -1 else -(-in_features // group_size)
