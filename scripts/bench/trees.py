"""Two versions of the code against each other in one run: loading, prefill and decode, taken in turns.

    pip install --no-deps --target BEFORE OLD_CHECKOUT      # and likewise AFTER
    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/trees.py FOLDER --before BEFORE --after AFTER

Each version runs in a process of its own that is put on its folder by PYTHONPATH; both compute the same things one
after the other, and the order changes from round to round. Ratios are after / before, pair by pair: for seconds and
memory, below 1 is better.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarking import print_head, timed

DECODED = 32  # tokens of one measurement
VERSIONS = ("before", "after")
MEASURED = ("load", "peak", "prefill", "decode", "python")


class Version:
    """One version of the code in a process, which answers a line with a number."""

    def __init__(self, packages: Path, args: argparse.Namespace) -> None:
        options = [str(args.folder), "--threads", str(args.threads), "--prompt-tokens", str(args.prompt_tokens)]
        environment = os.environ | {"PYTHONPATH": str(packages)}
        command = [sys.executable, __file__, *options, "--child"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def measure(self, what: str) -> float:
        """Seconds, or MiB, of one measurement."""
        print(what, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path, metavar="DIR", help="where the older version is installed")
    parser.add_argument("--after", type=Path, metavar="DIR", help="where the newer one is")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--measure", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        answer_measurements(args)
        return 0
    if args.before is None or args.after is None:
        parser.error("--before and --after are needed")
    print_head("two versions of the code")
    print(f"{'':28} {'before':>10} {'after':>10}   after / before: median (range)")
    tokens = {"prefill": f" {args.prompt_tokens}", "decode": f" {DECODED}"}
    for what in args.measure:
        report(what + tokens.get(what, ""), pairs(what, args))
    return 0


def pairs(what: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    """(before, after) of every round."""
    fresh = what in ("load", "peak")  # measured once in a process
    found = []
    versions = None if fresh else start(args)
    for number in range(args.rounds):
        running = versions or start(args)
        order = VERSIONS if number % 2 == 0 else tuple(reversed(VERSIONS))
        values = {name: running[name].measure(what) for name in order}
        found.append((values["before"], values["after"]))
        if fresh:
            for version in running.values():
                version.end()
    for version in (versions or {}).values():
        version.end()
    return found


def start(args: argparse.Namespace) -> dict[str, Version]:
    """Both versions, each in a new process."""
    return {name: Version(getattr(args, name), args) for name in VERSIONS}


def report(what: str, found: list[tuple[float, float]]) -> None:
    """One line of the table."""
    unit = "MiB" if what == "peak" else "s"
    before, after = (statistics.median(column) for column in zip(*found, strict=True))
    ratios = sorted(second / first for first, second in found)
    spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    print(f"{what + ', ' + unit:28} {before:10.3f} {after:10.3f}   {spread}", flush=True)


def answer_measurements(args: argparse.Namespace) -> None:
    """The process of one version: a measurement for every line of standard input."""
    import ropewalk

    made: dict[str, object] = {}

    def model() -> object:
        if "model" not in made:
            made["model"] = ropewalk.load_model(args.folder, max_seq_len=4096, threads=args.threads)
        return made["model"]

    def peak() -> float:
        model()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def prefill() -> None:
        model().forward(list(range(args.prompt_tokens)), model().new_cache())

    def decode() -> None:
        cache = made.setdefault("cache", model().new_cache())
        cache.truncate(0)
        for token_id in range(DECODED):
            model().forward([token_id], cache)

    def start_python() -> None:
        subprocess.run([sys.executable, "-c", "import ropewalk; ropewalk.load_model"], check=True)

    actions = {"load": model, "prefill": prefill, "decode": decode, "python": start_python}
    for line in sys.stdin:
        name = line.strip()
        if name in ("prefill", "decode"):
            actions[name]()  # warm
        print(json.dumps(peak() if name == "peak" else timed(actions[name])), flush=True)


if __name__ == "__main__":
    sys.exit(main())
