"""Time to the first token of a short prompt: alone, and while a long prompt is read and four replies run.

    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/first_token.py FOLDER --threads 2

In each round: the short prompt alone; four replies, whose tokens come in plain steps; then a long prompt, and the short
one again (other tokens) while it is read. Reported are both times, and the longest that a token of the four replies
took from when the long prompt came until its first token, in plain steps of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarking import add_engine_arguments, model_folder, print_head, random_ids, spread
from clients import Client, new_engine
from ropewalk.engine.engine import Engine

MAX_RUNNING = 8
PLAIN_TOKENS = 200  # of each reply, for the time of a plain step
MOST_TOKENS = 100_000  # of a reply that ends when it is told to
POLL_S = 0.001
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Round:
    """Seconds. plain_s: of a step with one token of each reply. plain_longest_s: of the longest such step, which is
    what the machine adds. usual_s, longest_s: what 95 % and all of their tokens took at most, while the long prompt was
    read.
    """

    alone_s: float
    beside_s: float
    plain_s: float
    plain_longest_s: float
    usual_s: float
    longest_s: float
    long_s: float

    @property
    def limit_s(self) -> float:
        """The target for `beside_s`."""
        return 2 * self.alone_s + self.plain_s


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--long", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--short", type=int, default=64, help="tokens of the short one")
    parser.add_argument("--replies", type=int, default=4)
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.long, args.short = 2, 4000, 16
    torch.set_num_threads(args.threads)
    with model_folder(args) as folder:
        print_head(f"time to the first token, {folder.name}")
        engine = new_engine(folder, args, 2 * args.long, MAX_RUNNING)
    print(
        f"{args.compute}, {args.threads} threads; prompts of {args.short} and {args.long} tokens, {args.replies} "
        f"replies, {args.rounds} rounds"
    )
    report([one_round(engine, args, number) for number in range(args.rounds + 1)][1:])


def one_round(engine: Engine, args: argparse.Namespace, number: int) -> Round:
    """All of it once."""
    vocab_size = engine.model.config.vocab_size

    def started(name: str, prompt_tokens: int, num_tokens: int) -> Client:
        client = Client(engine, random_ids(prompt_tokens, f"{number} {name}", vocab_size), num_tokens)
        client.start()
        return client

    alone = started("alone", args.short, 1).finished()
    replies = [started(f"reply {n}", args.short, MOST_TOKENS) for n in range(args.replies)]
    wait_until(lambda: all(len(reply.token_s) > PLAIN_TOKENS for reply in replies), replies)
    plain_waits_s = [wait for reply in replies for wait in reply.waits_s[len(replies) :]]
    long = started("long", args.long, 1)
    wait_until(lambda: long.progress > 0, [long])
    beside = started("beside", args.short, 1).finished()
    was_read = long.is_alive()
    long.finished()
    for reply in replies:
        reply.leave()
    for reply in replies:
        reply.finished()
    if not was_read:
        raise SystemExit("the long prompt was read before the short one had its first token: give a longer one")
    waits_s = sorted(
        after - before
        for reply in replies
        for before, after in zip(reply.token_s, reply.token_s[1:], strict=False)
        if after > long.asked_s and before < long.token_s[0]
    )
    usual_s = waits_s[int(0.95 * len(waits_s))]
    return Round(
        alone_s=alone.first_token_s,
        beside_s=beside.first_token_s,
        plain_s=statistics.median(plain_waits_s),
        plain_longest_s=max(plain_waits_s),
        usual_s=usual_s,
        longest_s=waits_s[-1],
        long_s=long.first_token_s,
    )


def wait_until(condition: Callable[[], bool], clients: list[Client]) -> None:
    """Until it is so.

    Raises:
        RuntimeError: a client has failed, or it takes too long.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        for client in clients:
            if not client.is_alive():
                client.finished()
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing came for {PATIENCE_S:g} s; {threading.active_count()} threads are alive")
        time.sleep(POLL_S)


def report(rounds: list[Round]) -> None:
    """The table."""
    print(f"\n{'':46}median (middle half)")
    rows = {
        "first token of the short prompt, alone, ms": [1000 * r.alone_s for r in rounds],
        "the same beside the others, ms": [1000 * r.beside_s for r in rounds],
        "its target: twice alone plus a step, ms": [1000 * r.limit_s for r in rounds],
        "beside the others / target": [r.beside_s / r.limit_s for r in rounds],
        "first token of the long prompt, ms": [1000 * r.long_s for r in rounds],
        "a plain step of the replies, ms": [1000 * r.plain_s for r in rounds],
        "longest of the plain steps, in plain steps": [r.plain_longest_s / r.plain_s for r in rounds],
        "95 % of the waits of replies, in plain steps": [r.usual_s / r.plain_s for r in rounds],
        "longest wait of a reply, in plain steps": [r.longest_s / r.plain_s for r in rounds],
    }
    for name, values in rows.items():
        print(f"  {name:42}{spread(values)}")
    print("  targets: below 1 of the target, and at most 3 plain steps")


if __name__ == "__main__":
    main()
