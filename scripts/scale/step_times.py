"""How long the steps of a replica take on this machine, alone and beside others: what `simulation.py` needs to know.

    python scripts/bench/random_checkpoint.py .cache/1.1b --shape 1.1b
    python scripts/scale/step_times.py .cache/1.1b --threads 1 --replicas 1 2 4 > step_times.json

Each replica is a process. All measure the same at the same time, so each number says what a replica gets while so many
compute. `request_s`, what a request needs besides its steps, is measured by scripts/bench/cluster.py; give it here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import ropewalk  # noqa: E402
from benchmarking import random_ids  # noqa: E402
from filled_caches import filled  # noqa: E402
from ropewalk.model.step import Span  # noqa: E402
from simulation import StepCosts  # noqa: E402

DEPTH = 512  # tokens before those that are measured
MOST_REPLIES = 8
ROWS_BESIDE, ROWS_ALONE = 16, 512
BESIDE = 4  # replies beside which rows are measured
REPEATS = 5


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
    """Measured with 1 replica and with more at once."""
    found = {count: measured(folder, threads, count) for count in replicas}
    alone = found[1]
    slowdown, last = [], 1.0
    for count in range(1, max(replicas) + 1):
        if count in found:
            last = statistics.mean(b / a for a, b in zip(alone["replies"], found[count]["replies"], strict=True))
        slowdown.append(last)
    first, deep = alone["row"], alone["deep row"]
    keys = DEPTH / max(deep / first - 1, 0.01)
    return StepCosts(
        replies_s=tuple(alone["replies"]),
        row_s=first,
        alone_row_s=alone["row alone"] / (1 + ROWS_ALONE / 2 / keys),
        keys=keys,
        request_s=request_s,
        slowdown=(1.0, *slowdown[1:]),
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


def measured(folder: Path, threads: int, count: int) -> dict[str, Any]:
    """What each of so many replicas takes on average, all at once."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    workers = [
        context.Process(target=work, args=(folder, threads, barrier, results), daemon=True) for _ in range(count)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    means = {name: statistics.mean(each[name] for each in found) for name in found[0] if name != "replies"}
    columns = zip(*(each["replies"] for each in found), strict=True)
    return means | {"replies": [statistics.mean(column) for column in columns]}


def work(folder: Path, threads: int, barrier: Any, results: Any) -> None:
    """One replica: measures when all are ready."""
    torch.set_num_threads(1)
    model = ropewalk.load_model(folder, max_seq_len=4 * DEPTH, backend="cpu", threads=threads, cache_memory=4 << 30)
    with torch.inference_mode():
        caches = [filled(model, DEPTH) for _ in range(MOST_REPLIES)]
        empty, deep = model.new_cache(), filled(model, 2 * DEPTH)
        ids = random_ids(ROWS_ALONE, 1, model.config.vocab_size)

        def step(num_replies: int, rows: int = 0, cache: Any = None) -> float:
            spans = [Span([7], each) for each in caches[:num_replies]]
            spans += [Span(ids[:rows], cache, "none")] if rows else []
            lengths = [span.cache.length for span in spans]
            seconds = timed(lambda: model.step(spans))
            for span, length in zip(spans, lengths, strict=True):
                span.cache.truncate(length)
            return seconds

        step(MOST_REPLIES, ROWS_BESIDE, empty)
        barrier.wait()
        replies = [median_of(lambda n=n: step(n)) for n in range(1, MOST_REPLIES + 1)]
        beside = {
            name: (median_of(lambda c=cache: step(BESIDE, ROWS_BESIDE, c)) - replies[BESIDE - 1]) / ROWS_BESIDE
            for name, cache in (("row", empty), ("deep row", deep))
        }
        alone = median_of(lambda: step(0, ROWS_ALONE, empty)) / ROWS_ALONE
        barrier.wait()
    # Of the deep rows, 2 * DEPTH keys are there; half of what they cost more is that of DEPTH keys.
    half = (beside["deep row"] + beside["row"]) / 2
    results.put({"replies": replies, "row": beside["row"], "deep row": half, "row alone": alone})


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median_of(measure: Callable[[], float]) -> float:
    """Of several measurements."""
    return statistics.median(measure() for _ in range(REPEATS))


if __name__ == "__main__":
    main()
