"""Ten, a hundred and a thousand machines: tables of throughput and waiting, simulated with measured step times.

    python scripts/scale/plan.py step_times.json --front-ms 0.2

Each line is one change to a cluster whose people keep it at `--busy` of what it can do: routing by load alone, one
machine in a hundred three times as slow, each machine failing once an hour, one server in front for all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from benchmarking import print_head  # noqa: E402
from results import Result, result_of  # noqa: E402
from ropewalk.cluster.routing import PrefixRouting, TwoChoices  # noqa: E402
from ropewalk.generate.scheduler.plan import PAGE_ROWS  # noqa: E402
from simulation import Cluster, Simulation, StepCosts  # noqa: E402
from step_times import read_costs  # noqa: E402
from workload import BLOCK_TOKENS, Workload  # noqa: E402

CONVERSATION = Workload(
    num_conversations=10**9,
    num_turns=6,
    num_systems=50,
    system_tokens=500,
    turn_tokens=120,
    reply_tokens=150,
    think_s=20.0,
    varies=True,
)
MACHINES_OF_A_FRONT = 20
Variant = tuple[str, Callable[[Cluster], Cluster], Callable[[], Any]]
VARIANTS: tuple[Variant, ...] = (
    ("prefix routing", lambda cluster: cluster, PrefixRouting),
    ("routing by load", lambda cluster: cluster, TwoChoices),
    ("one front for all", lambda cluster: replace(cluster, fronts=1), PrefixRouting),
    ("1 in 100 machines slow", lambda cluster: replace(cluster, slow=max(1, cluster.machines // 100)), PrefixRouting),
    ("each fails once an hour", lambda cluster: replace(cluster, mtbf_s=3600.0), PrefixRouting),
)


def main() -> None:
    """Print a table for each number of machines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", type=Path, help="what step_times.py has printed")
    parser.add_argument("--machines", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--front-ms", type=float, default=0.2, help="of a server in front, for a token")
    parser.add_argument(
        "--route-us", type=float, default=2.0, help="likewise, for a request and a replica to choose from"
    )
    parser.add_argument(
        "--busy", type=float, default=0.6, help="part of what the machines can do that is asked of them"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="simulated")
    args = parser.parse_args()
    costs = read_costs(args.costs)
    print_head("many machines, simulated")
    rate = conversations_s(costs)
    print(f"a machine can hold {rate:.3f} conversations a second, and is asked {args.busy:.0%} of that")
    for machines in args.machines:
        print(f"\n{machines:,} machines, {args.seconds:g} s")
        print(f"{'':26}tokens/s   from a cache   first token, s: median      95 %      99 %   restarts")
        workload = replace(CONVERSATION, rate=args.busy * rate * machines)
        cluster = Cluster(
            machines,
            fronts=max(1, machines // MACHINES_OF_A_FRONT),
            front_s=args.front_ms / 1e3,
            route_s=args.route_us / 1e6,
        )
        for name, change, make_routing in VARIANTS:
            simulation = Simulation(costs, change(cluster), workload, make_routing).run(args.seconds)
            print(line(name, result_of(simulation), simulation.num_restarts))


def conversations_s(costs: StepCosts) -> float:
    """How many conversations a second one machine can serve with all places taken and prompts found in the cache."""
    # Of the last page and block that a prompt shares with the one before it, half has to be read again.
    again = (PAGE_ROWS + BLOCK_TOKENS) / 2
    turn_rows = CONVERSATION.turn_tokens + again + CONVERSATION.system_tokens / CONVERSATION.num_turns
    depth = CONVERSATION.system_tokens + 3 * (CONVERSATION.turn_tokens + CONVERSATION.reply_tokens)
    replies = Cluster(1).most_running
    reply_s = CONVERSATION.reply_tokens * costs.plain_s(replies) / replies
    return 1 / (CONVERSATION.num_turns * (reply_s + turn_rows * costs.row_s * costs.row_work(depth) + costs.request_s))


def line(name: str, result: Result, restarts: int) -> str:
    """One line of the table."""
    median, high, highest = result.first_s
    return (
        f"{name:<26}{result.tokens_s:8,.0f}{result.cached:14.0%}{median:28.2f}{high:10.2f}{highest:10.2f}{restarts:11}"
    )


if __name__ == "__main__":
    main()
