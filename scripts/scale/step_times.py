"""How long the steps of a replica take on this machine, alone and beside others: what `simulation.py` needs to know.

    python scripts/bench/random_checkpoint.py .cache/1.1b --shape 1.1b
    python scripts/scale/step_times.py .cache/1.1b --threads 1 --replicas 1 2 4 > step_times.json

Each replica is a process. First one measures, then so many at the same time, and again: so numbers say what a replica
gets while so many compute, and a machine that gets slower meanwhile does so for all of them. `request_s`, what a
request needs besides its steps, is measured by scripts/bench/cluster.py; give it here.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import ropewalk  # noqa: E402
from benchmarking import random_ids  # noqa: E402
from filled_caches import filled  # noqa: E402
from ropewalk.generate.generate import Generation  # noqa: E402
from ropewalk.generate.sampling import SamplingParams  # noqa: E402
from ropewalk.generate.scheduler.scheduler import Scheduler  # noqa: E402
from ropewalk.model.cache import KvCache  # noqa: E402
from ropewalk.model.model import Model  # noqa: E402
from ropewalk.model.step import Span  # noqa: E402
from simulation import StepCosts  # noqa: E402

DEPTH = 512  # tokens before those that are measured
MOST_REPLIES = 8
ROWS_BESIDE, ROWS_ALONE = 16, 256
BESIDE = 4  # replies beside which rows are measured
ROUNDS, REPEATS = 3, 3
TOKENS = 12  # of each reply


def main() -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="of each replica")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2], help="at once; the first must be 1")
    parser.add_argument("--request-s", type=float, default=0.0, help="seconds of a request besides its steps")
    args = parser.parse_args()
    if args.replicas[0] != 1 or args.replicas != sorted(args.replicas):
        parser.error("--replicas must begin with 1 and rise")
    print(json.dumps(as_json(step_costs(args.folder, args.threads, args.replicas, args.request_s)), indent=2))


def step_costs(folder: Path, threads: int, replicas: Sequence[int], request_s: float = 0.0) -> StepCosts:
    """Measured with 1 replica and with more at once; what lies between is interpolated."""
    found = measured(folder, threads, replicas)
    alone = found[1]
    slowdown = [
        statistics.mean(b / a for a, b in zip(alone["replies"], found[count]["replies"], strict=True))
        for count in replicas
    ]
    rows_s = [found[count]["row"] + found[count]["row alone"] for count in replicas]
    jitter = [found[count]["jitter"] for count in replicas]
    every = range(1, max(replicas) + 1)
    first, deep = alone["row"], alone["deep row"]
    keys = DEPTH / max(deep / first - 1, 0.01)
    return StepCosts(
        replies_s=tuple(alone["replies"]),
        row_s=first,
        alone_row_s=alone["row alone"] / (1 + ROWS_ALONE / 2 / keys),
        keys=keys,
        request_s=request_s,
        slowdown=tuple(np.interp(every, replicas, slowdown).tolist()),
        jitter=tuple(np.interp(every, replicas, jitter).tolist()),
        row_slowdown=tuple(np.interp(every, replicas, [each / rows_s[0] for each in rows_s]).tolist()),
    )


def mean_costs(found: Sequence[StepCosts]) -> StepCosts:
    """Of several measurements with the same numbers of replicas."""
    means = {}
    for name in StepCosts.__slots__:
        values = [getattr(costs, name) for costs in found]
        many = isinstance(values[0], tuple)
        means[name] = tuple(map(statistics.mean, zip(*values, strict=True))) if many else statistics.mean(values)
    return StepCosts(**means)


def as_json(costs: StepCosts) -> dict[str, Any]:
    """As `read_costs` reads it."""
    return {name: getattr(costs, name) for name in StepCosts.__slots__}


def read_costs(path: Path) -> StepCosts:
    """From a file that this script has written."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    return StepCosts(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


Times = dict[str, Any]  # "replies": of a step with 1, 2, ... of them; "jitter": how they vary; others of a row


def measured(folder: Path, threads: int, counts: Sequence[int]) -> dict[int, Times]:
    """What each replica takes while so many compute: the median of the rounds."""
    context = multiprocessing.get_context("spawn")
    most = max(counts)
    barrier, results = context.Barrier(most), context.Queue()
    workers = [
        context.Process(target=work, args=(number, counts, folder, threads, barrier, results), daemon=True)
        for number in range(most)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, list[Times]] = {count: [] for count in counts}
    for _ in range(ROUNDS * sum(counts)):
        count, times = results.get(timeout=600)
        found[count].append(times)
    for worker in workers:
        worker.join()
    return {count: median_times(times) for count, times in found.items()}


def median_times(times: Sequence[Times]) -> Times:
    """Of each number on its own."""
    medians = {name: statistics.median(each[name] for each in times) for name in times[0] if name != "replies"}
    columns = zip(*(each["replies"] for each in times), strict=True)
    return medians | {"replies": [statistics.median(column) for column in columns]}


def work(number: int, counts: Sequence[int], folder: Path, threads: int, barrier: Any, results: Any) -> None:
    """One replica: measures when it is one of those that are to."""
    torch.set_num_threads(1)
    model = ropewalk.load_model(folder, max_seq_len=4 * DEPTH, backend="cpu", threads=threads, cache_memory=4 << 30)
    with torch.inference_mode():
        steps = Steps(model)
        steps.times()  # to warm up
        for _ in range(ROUNDS):
            for count in counts:
                barrier.wait()
                if number < count:
                    results.put((count, steps.times()))
        barrier.wait()


class Steps:
    """Steps of one model, with replies after DEPTH tokens and rows of a prompt after none or 2 * DEPTH.

    Replies run as they do in a server, each in a thread: what lies between two steps counts as well.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._scheduler = model, Scheduler(model)
        self._prompt = random_ids(DEPTH + 1, 0, model.config.vocab_size)
        self._caches = [filled(model, DEPTH) for _ in range(MOST_REPLIES)]
        self._empty, self._deep = model.new_cache(), filled(model, 2 * DEPTH)
        self._ids = random_ids(ROWS_ALONE, 1, model.config.vocab_size)

    def times(self) -> Times:
        """All of them, measured now."""
        gaps_s = [self._gaps_s(count) for count in range(1, MOST_REPLIES + 1)]
        replies = [statistics.mean(gaps) for gaps in gaps_s]
        around = [math.log(gap / mean) for gaps, mean in zip(gaps_s, replies, strict=True) for gap in gaps]
        plain_s = self._mean_s(BESIDE)
        row, deep = (
            (self._mean_s(BESIDE, ROWS_BESIDE, cache) - plain_s) / ROWS_BESIDE for cache in (self._empty, self._deep)
        )
        alone = self._mean_s(0, ROWS_ALONE, self._empty) / ROWS_ALONE
        # 2 * DEPTH keys are there for a deep row; half of what it costs more is that of DEPTH keys.
        deep = (deep + row) / 2
        return {
            "replies": replies,
            "row": row,
            "deep row": deep,
            "row alone": alone,
            "jitter": statistics.stdev(around),
        }

    def _gaps_s(self, count: int) -> list[float]:
        """Between the tokens of so many replies that run together."""
        with ThreadPoolExecutor(count) as pool:
            stamps = list(pool.map(lambda _: self._reply(), range(count)))
        started = max(each[0] for each in stamps)
        together = [[stamp for stamp in each if stamp >= started] for each in stamps]
        return [b - a for each in together for a, b in pairwise(each)]

    def _reply(self) -> list[float]:
        """When each of its tokens came."""
        params = SamplingParams(temperature=0, max_new_tokens=TOKENS, ignore_eos=True)
        with torch.inference_mode(), self._scheduler.open(self._prompt) as sequence:
            return [time.perf_counter() for _ in Generation(sequence, params)]

    def _mean_s(self, num_replies: int, rows: int = 0, cache: KvCache | None = None) -> float:
        return statistics.mean(self._seconds(num_replies, rows, cache) for _ in range(REPEATS))

    def _seconds(self, num_replies: int, rows: int, cache: KvCache | None) -> float:
        spans = [Span([7], each) for each in self._caches[:num_replies]]
        spans += [Span(self._ids[:rows], cache, "none")] if cache is not None else []
        lengths = [span.cache.length for span in spans]
        started = time.perf_counter()
        self._model.step(spans)
        seconds = time.perf_counter() - started
        for span, length in zip(spans, lengths, strict=True):
            span.cache.truncate(length)
        return seconds


if __name__ == "__main__":
    main()
