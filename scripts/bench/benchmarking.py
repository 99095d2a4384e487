"""What the benchmark scripts share: the head of a report, paired timing, and the limits of the hardware."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from random_checkpoint import write_random_checkpoint, write_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that the measurements of prefill and decode have in common."""
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa")
    parser.add_argument("--compute", nargs="+", default=["int8", "exact"])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--context", type=int, default=128, help="positions cached before a token is decoded")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the measurements of requests that share steps."""
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compute", default="int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny model and small numbers: does the script run?")


@contextmanager
def model_folder(args: argparse.Namespace, shape: str = "tiny") -> Iterator[Path]:
    """The checkpoint to measure, with a tokenizer: the one named, or for --smoke a tiny one made for the occasion.

    shape: of the tiny one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            folder = Path(scratch) / shape
            write_random_checkpoint(folder, shape, group_size=64)
            yield folder
        elif args.folder is None:
            raise SystemExit("a model folder is needed (or --smoke)")
        elif any((args.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            yield args.folder
        else:
            yield with_tokenizer(args.folder, Path(scratch))


def with_tokenizer(folder: Path, scratch: Path) -> Path:
    """The same checkpoint in another folder, by links, with a tokenizer of made-up words."""
    linked = scratch / folder.name
    linked.mkdir()
    for file in folder.resolve().iterdir():
        (linked / file.name).symlink_to(file)
    write_tokenizer(linked, json.loads((folder / "config.json").read_text())["vocab_size"])
    return linked


def random_ids(count: int, seed: object, vocab_size: int) -> list[int]:
    """Tokens of no special meaning, always the same for a seed."""
    rng = random.Random(str(seed))
    return [rng.randrange(300, vocab_size) for _ in range(count)]


def print_head(title: str) -> None:
    """Date, machine, commit and command: what a reader needs to run the same thing again."""
    print(f"# {title}")
    print(f"# date: {datetime.date.today().isoformat()}; commit: {commit()}; command: {' '.join(sys.argv)}")
    print(f"# machine: {cpu_name()}, {torch.get_num_threads()} threads of torch, torch {torch.__version__}")


def commit() -> str:
    """The commit checked out, with a plus if the tree differs from it."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def cpu_name() -> str:
    """The processor's name as the system gives it, with the number of its cores that we may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} x {len(names)}"


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that one call takes."""
    start = clock()
    work()
    return clock() - start


def paired(
    works: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds that each function takes in each of `rounds` rounds, after one warm-up round.

    The functions take turns, so that whatever else the machine is doing affects all of them; compare within a round.
    clock: `time.thread_time` counts the processor time of the calling thread, for machines that are busy otherwise.
    """
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(timed(work, clock))
    return times


def spread(values: list[float]) -> str:
    """Median and the range of the middle half."""
    if len(values) < 4:
        return f"{statistics.median(values):9.3f}  ({min(values):.3f} to {max(values):.3f})"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:9.3f}  ({low:.3f} to {high:.3f})"


def memory_reader(num_bytes: int = 1 << 30) -> Callable[[], object]:
    """A function that reads `num_bytes` from memory once: the yardstick of decoding."""
    data = torch.ones(num_bytes // 8, dtype=torch.int64)
    return data.sum
