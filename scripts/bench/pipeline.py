"""Layers spread over several processes beside one: memory of each rank, bits, tokens a second, cost of a message.

    python scripts/bench/random_checkpoint.py FOLDER --shape 7b
    python scripts/bench/pipeline.py FOLDER --ranks 2 4

One process has --threads threads; the ranks of a pipeline share as many, at least one each. Replies are decoded in as
many steps under way as there are ranks, a part of the sequences in each. Such steps read the weights once for each
part: what the bytes allow is therefore what one process does in steps of the same sizes, one after the other, and the
table has both this and the one process with all sequences in a step. All programs take turns within a round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median

import torch

import ropewalk
from benchmarking import add_engine_arguments, model_folder, print_head, random_ids, spread
from ropewalk.backends.pipeline.messages import Step, decode, encode
from ropewalk.backends.pipeline.wire import Wire
from ropewalk.base.memory import format_bytes
from ropewalk.model.model import Model
from ropewalk.model.pipeline.machine import Seat
from ropewalk.model.pipeline.meeting import Meeting
from ropewalk.model.step import Span

SEQUENCES = (1, 8)
MESSAGE_ROWS = (1, 8, 64, 512)
HIDDEN = 4096
MESSAGES = 200


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--context", type=int, default=128, help="positions cached before a token is decoded")
    parser.add_argument("--tokens", type=int, default=16, help="decoded per sequence and measurement")
    parser.add_argument("--program", type=int, metavar="RANKS", help=argparse.SUPPRESS)
    parser.add_argument("--echo", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.echo is not None:
        echo(args.echo)
        return
    if args.program is not None:
        run_program(args)
        return
    if args.smoke:
        args.rounds, args.context, args.tokens = 2, 8, 3
    with model_folder(args) as folder:
        print_head(f"layers over several processes, {folder.name}, {args.compute}")
        report_messages()
        with programs(args, folder) as running:
            report_memory(running)
            report_rates(running, args)


@contextmanager
def programs(args: argparse.Namespace, folder: Path) -> Iterator[dict[int, subprocess.Popen]]:
    """One process, and the pipelines, each loaded and waiting; by the number of ranks."""
    options = ["--threads", args.threads, "--compute", args.compute, "--context", args.context, "--tokens", args.tokens]
    running = {}
    try:
        for ranks in (1, *args.ranks):
            line = [sys.executable, __file__, str(folder), *map(str, options), "--program", str(ranks)]
            running[ranks] = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        yield running
    finally:
        for program in running.values():
            program.stdin.close()
            program.wait()


def ask(program: subprocess.Popen, **question: int) -> dict:
    """What a program answers."""
    program.stdin.write(json.dumps(question) + "\n")
    program.stdin.flush()
    return json.loads(program.stdout.readline())


def report_memory(running: dict[int, subprocess.Popen]) -> None:
    """Of each rank, its own: what it has written, without files and libraries."""
    print("\nmemory of each rank after the first tokens (and its peak, with libraries)")
    for ranks, program in running.items():
        for sequences in SEQUENCES:
            ask(program, sequences=sequences, parts=1)
        found = ask(program, memory=1)["memory"]
        cells = [f"{format_bytes(own)} ({format_bytes(peak)})" for own, peak in found]
        print(f"{ranks} {'process' if ranks == 1 else 'ranks  '}  {'  '.join(cells)}")


def report_rates(running: dict[int, subprocess.Popen], args: argparse.Namespace) -> None:
    """Tokens a second, and whether the tokens and their logits are those of one process."""
    cases = [(1, sequences, parts) for sequences in SEQUENCES for parts in sorted({1, *parts_of(sequences, args)})]
    cases += [(ranks, n, min(n, ranks)) for ranks in args.ranks for n in SEQUENCES]
    rates: dict[tuple[int, int, int], list[float]] = {case: [] for case in cases}
    digests: dict[int, set[str]] = {sequences: set() for sequences in SEQUENCES}
    for number in range(args.rounds + 1):
        for case in cases:
            answer = ask(running[case[0]], sequences=case[1], parts=case[2])
            digests[case[1]].add(answer["digest"])
            if number:  # the first round is a warm-up
                rates[case].append(answer["rate"])
    print("\nranks  sequences  steps of  tokens/s             of one process, all in a step  of one, in such steps")
    for (ranks, sequences, parts), found in rates.items():
        whole, same = rates[1, sequences, 1], rates[1, sequences, parts]
        ratios = [median(map(truediv, found, other)) for other in (whole, same)]
        size = -(-sequences // parts)
        print(f"{ranks:5}  {sequences:9}  {size:8}  {spread(found):20}  {ratios[0]:.2f}  {ratios[1]:29.2f}")
    for sequences, found in digests.items():
        same = "the same bits" if len(found) == 1 else "DIFFERENT BITS"
        print(f"# logits of {sequences} sequences: {same} in all of these")


def parts_of(sequences: int, args: argparse.Namespace) -> list[int]:
    """Into how many steps the pipelines share so many sequences out."""
    return [min(sequences, ranks) for ranks in args.ranks]


def run_program(args: argparse.Namespace) -> None:
    """Load, then answer questions on standard input."""
    threads = max(1, args.threads // args.program)
    torch.set_num_threads(1)
    pipeline = None if args.program == 1 else args.program
    length = args.context + args.tokens + 1
    model = ropewalk.load_model(
        args.folder, length, compute=args.compute, threads=threads, pipeline=pipeline, rope_scaling="auto"
    )
    for line in sys.stdin:
        question = json.loads(line)
        answer = {"memory": rank_memory()} if "memory" in question else decoded(model, args, **question)
        print(json.dumps(answer), flush=True)
    model.close()


def decoded(model: Model, args: argparse.Namespace, sequences: int, parts: int) -> dict:
    """The rate of decoding so many sequences in so many parts, which are under way at once where they can be."""
    caches = [model.new_cache() for _ in range(sequences)]
    prompts = [random_ids(args.context, number, model.config.vocab_size) for number in range(sequences)]
    first = [model.forward(ids, cache) for ids, cache in zip(prompts, caches, strict=True)]
    size = -(-sequences // parts)
    groups = [list(range(low, min(low + size, sequences))) for low in range(0, sequences, size)]
    logits, digest = dict(enumerate(first)), {number: hashlib.sha256() for number in range(sequences)}
    under_way: deque = deque()
    waiting = deque(group for _ in range(args.tokens) for group in groups)
    start = time.perf_counter()
    while waiting or under_way:
        if under_way and (not waiting or len(under_way) >= min(parts, model.steps_under_way)):
            group, running = under_way.popleft()
            for number, row in zip(group, running.finish_(), strict=True):
                logits[number] = row
                digest[number].update(row.numpy())
        else:
            group = waiting.popleft()
            spans = [Span([int(logits[number][-1].argmax())], caches[number]) for number in group]
            under_way.append((group, model.begin_step(spans)))
    rate = sequences * args.tokens / (time.perf_counter() - start)
    whole = hashlib.sha256("".join(each.hexdigest() for each in digest.values()).encode())
    return {"rate": rate, "digest": whole.hexdigest()}


def rank_memory() -> list[tuple[int, int]]:
    """(bytes of its own, peak) of this process and its children."""
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    found = []
    for process in ("self", *sorted(children, key=int)):
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        found.append((int(lines["RssAnon"].split()[0]) << 10, int(lines["VmHWM"].split()[0]) << 10))
    return found


def report_messages() -> None:
    """What a message with rows costs on loopback, one way."""
    meeting, port = Meeting.hosted(2)
    child = subprocess.Popen([sys.executable, __file__, "--echo", str(port)])
    wire = meeting.gather(lambda: None)
    print(f"\na message with rows of {HIDDEN}: one way on loopback, and of that to write and to read it (us)")
    print("rows  bytes     one way  written  read")
    for rows in MESSAGE_ROWS:
        message = step_message(rows)
        times = []
        for _ in range(MESSAGES if rows < MESSAGE_ROWS[-1] else MESSAGES // 10):
            start = time.perf_counter()
            wire.send_(message)
            wire.receive()
            times.append((time.perf_counter() - start) / 2)
        prefix, body = encode(message)
        writing, reading = cost(partial(encode, message)), cost(partial(decode, prefix, body))
        print(f"{rows:4}  {len(body):8}  {1e6 * median(times):7.0f}  {1e6 * writing:7.0f}  {1e6 * reading:4.0f}")
    meeting.finish()
    child.wait()


def cost(work: Callable[[], object]) -> float:
    """Seconds of one call, the median of some."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def step_message(rows: int) -> Step:
    """A step of sequences with 512 positions each, through 16 layer instances of the next rank."""
    spans = torch.tensor([[1, 500, 8, 0]] * rows)
    uses = torch.arange(16).repeat_interleave(2).view(16, 2)
    tables = torch.zeros(1, rows, 64)
    pages, weights = torch.arange(8 * rows), torch.ones(16, dtype=torch.float64)
    return Step(1, [], spans, pages, uses, weights, tables, tables, torch.zeros(rows, HIDDEN))


def echo(port: int) -> None:
    """The other end: every message goes back."""
    meeting = Meeting.visited(Seat(1, 2, 1, 2), port)
    wire = meeting.wait_to_begin()
    assert isinstance(wire, Wire)
    for count in MESSAGE_ROWS:
        for _ in range(MESSAGES if count < MESSAGE_ROWS[-1] else MESSAGES // 10):
            wire.pass_on_(wire.receive())
    meeting.wait_to_finish()


if __name__ == "__main__":
    main()
