"""The simulation beside what it simulates: the same conversations on real replicas under Ray on this machine.

    python scripts/scale/check.py .cache/1.1b --replicas 2 4

Measures the step times before and after each run of the real thing and simulates with the mean of both, since the speed
of a machine that others use changes within minutes. The model must know the vocabulary of its
tokenizer; one without a tokenizer gets the embedded model's.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from benchmarking import print_head, with_tokenizer  # noqa: E402
from cluster import SYSTEM_WORDS, TURN_WORDS, TraceResult, replay, replicas_of  # noqa: E402
from results import Result, percentiles, result_of  # noqa: E402
from ropewalk.cluster.routing import PrefixRouting  # noqa: E402
from simulation import Cluster, Simulation, StepCosts  # noqa: E402
from step_times import mean_costs, step_costs  # noqa: E402
from workload import Workload  # noqa: E402

REPLY_TOKENS, NUM_SYSTEMS, THINK_S = 24, 4, 0.2  # those of scripts/bench/cluster.py
ROWS = ("seconds", "tokens/s", "from a cache, %", "first token, median, s", "later turns, median, s", "their 95 %, s")


def main() -> None:
    """Measure, simulate, print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--request-s", type=float, default=0.005, help="see scripts/bench/cluster.py, overhead")
    args = parser.parse_args()
    print_head("the simulation beside real replicas")
    with tempfile.TemporaryDirectory() as scratch:
        has_tokenizer = any((args.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
        folder = args.folder if has_tokenizer else with_tokenizer(args.folder, Path(scratch))
        for count in args.replicas:
            with replicas_of(count, [str(folder)]) as front:  # what Ray takes of the machine, it takes from both
                before = step_costs(folder, 1, sorted({1, 2, count}), args.request_s)
                real, workload = measured(front.url, args)
                after = step_costs(folder, 1, sorted({1, 2, count}), args.request_s)
            costs = mean_costs([before, after])
            simulated = result_of(Simulation(costs, Cluster(1, count), workload, PrefixRouting).run())
            print_costs(costs)
            print_both(count, real, simulated)


def measured(url: str, args: argparse.Namespace) -> tuple[Result, Workload]:
    """What real replicas do, and the workload in tokens."""
    started = time.perf_counter()
    trace = asyncio.run(replay(url, args.conversations, args.turns, args.at_once))
    seconds = time.perf_counter() - started
    if trace.errors:
        raise SystemExit(f"{trace.errors} conversations broke off")
    result = Result(
        seconds,
        REPLY_TOKENS * args.conversations * args.turns / seconds,
        trace.cached_tokens / trace.prompt_tokens,
        percentiles(trace.first_s),
        percentiles(trace.first_s_later),
    )
    return result, workload_of(trace, args)


def workload_of(trace: TraceResult, args: argparse.Namespace) -> Workload:
    """The conversations of the trace: turn k has the system prompt, k questions and k - 1 replies before it."""
    turns = args.turns
    a_conversation = trace.prompt_tokens / args.conversations - REPLY_TOKENS * turns * (turns - 1) / 2
    a_word = a_conversation / (SYSTEM_WORDS * turns + TURN_WORDS * turns * (turns + 1) / 2)
    return Workload(
        at_once=args.at_once,
        num_conversations=args.conversations,
        num_turns=turns,
        num_systems=NUM_SYSTEMS,
        system_tokens=round(SYSTEM_WORDS * a_word),
        turn_tokens=round(TURN_WORDS * a_word),
        reply_tokens=REPLY_TOKENS,
        think_s=THINK_S,
    )


def print_costs(costs: StepCosts) -> None:
    """What the simulation was given."""
    slower, rows_slower = (", ".join(f"{each:.2f}" for each in row) for row in (costs.slowdown, costs.row_slowdown))
    print(f"\na step with 1 to 8 replies: {costs.replies_s[0]:.4f} to {costs.replies_s[-1]:.4f} s; a row of a prompt")
    print(f"{costs.row_s:.4f} s, alone {costs.alone_row_s:.4f}; twice as long after {costs.keys:,.0f} keys")
    print(f"with 1, 2, ... replicas computing, replies take so many times as long: {slower}; rows {rows_slower}")
    print(f"steps vary by {', '.join(f'{each:.0%}' for each in costs.jitter)}")


def print_both(count: int, real: Result, simulated: Result) -> None:
    """A table of both, and how they compare."""
    print(f"{count} replicas{'':20}measured   simulated   simulated / measured")
    for name, there, here in zip(ROWS, numbers(real), numbers(simulated), strict=True):
        print(f"  {name:<26}{there:10.2f}{here:12.2f}{here / there:14.2f}")


def numbers(result: Result) -> tuple[float, ...]:
    """In the order of ROWS."""
    return (
        result.seconds,
        result.tokens_s,
        100 * result.cached,
        result.first_s[0],
        result.later_s[0],
        result.later_s[1],
    )


if __name__ == "__main__":
    main()
