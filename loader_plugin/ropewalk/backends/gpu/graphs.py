"""Steps of single tokens as CUDA graphs: the 300 launches of a decoded token become one.

    the first step of a kind: launched one by one, which compiles what is new
    the second: captured on buffers of its own, and replayed
    from then on: the step's numbers and rows copied to these buffers, replayed, the rows copied back

Steps are of one kind if they have as many rows, tables of pages of the same width (one for each 512 positions) and run
the same layer instances with the same weights. All else that differs between them is read from the device (`GpuStep`).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from ropewalk.backends.gpu.layers import GpuLayer
from ropewalk.backends.gpu.step import GpuStep

logger = logging.getLogger(__name__)

MOST_ROWS = 16  # of a step that is captured: larger ones keep a card busy for longer than they take to launch
KEPT = 64  # kinds that are remembered

Launches = Callable[[], None]
Capture = Callable[[Launches], Launches]  # launches once -> what replays them


@dataclass(frozen=True, slots=True)
class LayerRun:
    """One layer instance of a step without changes: which keys and values are its own, and its weight in the sum."""

    layer: GpuLayer
    instance: int
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """Replays a step on the buffers of `held`."""

    held: GpuStep
    replay: Launches

    def run_(self, step: GpuStep) -> None:
        held = self.held
        for mine, given in ((held.x, step.x), (held.cos, step.cos), (held.sin, step.sin), (held.numbers, step.numbers)):
            mine.copy_(given)
        self.replay()
        step.x.copy_(held.x)


class StepGraphs:
    """The graphs of one backend. capture: see `cuda_capture`; a kind that it fails for is launched one by one."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._lock = threading.Lock()  # models that share weights may run in several threads
        self._kinds: OrderedDict[Hashable, _Graph | None] = OrderedDict()  # None: seen once
        self._refused: set[Hashable] = set()

    def takes(self, step: GpuStep) -> bool:
        """Whether steps like this one are captured."""
        return 0 < step.num_rows <= MOST_ROWS and len(step.spans) == step.num_rows

    def run_(self, step: GpuStep, runs: Sequence[LayerRun]) -> None:
        """Run these layer instances on the rows of the step."""
        with self._lock:
            graph = self._graph(_kind(step, runs), step, runs)
            if graph is not None:
                graph.run_(step)
                return
        launch(step, runs)

    def _graph(self, kind: Hashable, step: GpuStep, runs: Sequence[LayerRun]) -> _Graph | None:
        if kind in self._refused:
            return None
        if kind not in self._kinds:
            self._kinds[kind] = None
            if len(self._kinds) > KEPT:
                self._kinds.popitem(last=False)
            return None
        self._kinds.move_to_end(kind)
        if self._kinds[kind] is None:
            self._kinds[kind] = self._captured(kind, step, runs)
        return self._kinds[kind]

    def _captured(self, kind: Hashable, step: GpuStep, runs: Sequence[LayerRun]) -> _Graph | None:
        held = GpuStep(step.x.clone(), step.cos.clone(), step.sin.clone(), step.spans)
        held.spans = ()  # pages belong to their sequences
        try:
            return _Graph(held, self._capture(lambda: launch(held, runs)))
        except RuntimeError as error:
            logger.warning("steps of %d rows are launched kernel by kernel: no CUDA graph (%s)", step.num_rows, error)
            self._refused.add(kind)
            return None


def launch(step: GpuStep, runs: Sequence[LayerRun]) -> None:
    """Run layer instances kernel by kernel."""
    for run in runs:
        run.layer.run_(step, run.instance, run.weight, ())


def cuda_capture(device: torch.device) -> Capture:
    """Captures on a card. Temporary tensors of all graphs share one pool: they are replayed one after the other."""
    pool = torch.cuda.graph_pool_handle()

    def capture(launches: Launches) -> Launches:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating and launching meanwhile.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            launches()
        return graph.replay

    return capture


def _kind(step: GpuStep, runs: Sequence[LayerRun]) -> Hashable:
    return (step.num_rows, step.pages.shape, step.layout, step.num_instances, tuple(runs))
