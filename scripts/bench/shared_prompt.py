"""Clients with the same long beginning: is it computed once, and how soon do the later ones have their first token?

    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/shared_prompt.py FOLDER --threads 2

"at once": all clients ask together; those that come second wait for what the first one computes. "after": the first one
has its reply, and then the others ask, one after the other. Every round has a system prompt of its own. Rows computed
are the prompt tokens that each reply did not find computed.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch

from benchmarking import add_engine_arguments, model_folder, print_head, random_ids, spread
from clients import Client, new_engine
from ropewalk.engine.engine import Engine

TARGET = 0.2  # of the first client's time


@dataclass(frozen=True)
class Round:
    """Milliseconds to the first token, of the first to have it and of the others; prompt rows computed by all."""

    first_ms: float
    later_ms: list[float]
    rows: int


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--shared", type=int, default=2000, help="tokens that all prompts begin with")
    parser.add_argument("--own", type=int, default=30, help="tokens that follow, different for each")
    parser.add_argument("--tokens", type=int, default=8, help="of each reply")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.shared, args.own, args.clients = 2, 200, 10, 4
    torch.set_num_threads(args.threads)
    with model_folder(args) as folder:
        print_head(f"a shared beginning, {folder.name}")
        engine = new_engine(folder, args, args.shared + args.own + args.tokens, args.clients)
    print(
        f"{args.compute}, {args.threads} threads; {args.clients} clients, {args.shared} tokens shared, {args.own} "
        f"of their own, {args.rounds} rounds"
    )
    for name, together in (("at once", True), ("after", False)):
        rounds = [one_round(engine, args, f"{name} {number}", together) for number in range(args.rounds + 1)][1:]
        report(name, rounds, args)


def one_round(engine: Engine, args: argparse.Namespace, name: str, together: bool) -> Round:
    """All clients once."""
    vocab_size = engine.model.config.vocab_size
    shared = random_ids(args.shared, name, vocab_size)
    prompts = [shared + random_ids(args.own, f"{name} {number}", vocab_size) for number in range(args.clients)]
    clients = [Client(engine, prompt, args.tokens) for prompt in prompts]
    if together:
        for client in clients:
            client.start()
    for client in clients:
        if not together:
            client.start()
            client.join()
        client.finished()
    times = [1000 * client.first_token_s for client in clients]
    if together:
        times.sort()
    rows = sum(client.stats.prompt_tokens - client.stats.reused_tokens for client in clients)
    return Round(times[0], times[1:], rows)


def report(name: str, rounds: list[Round], args: argparse.Namespace) -> None:
    """One way of arriving."""
    print(f"\n{name:48}median (middle half)")
    once = args.shared + args.clients * args.own
    rows = {
        "first client's first token, ms": [r.first_ms for r in rounds],
        "later clients', median of a round, ms": [statistics.median(r.later_ms) for r in rounds],
        "later clients', longest of a round, ms": [max(r.later_ms) for r in rounds],
        "later median / first": [statistics.median(r.later_ms) / r.first_ms for r in rounds],
        f"prompt rows computed ({once} if shared ones once)": [float(r.rows) for r in rounds],
    }
    for what, values in rows.items():
        print(f"  {what:46}{spread(values)}")
    if name == "after":
        print(f"  target: later / first below {TARGET:g}")


if __name__ == "__main__":
    main()
