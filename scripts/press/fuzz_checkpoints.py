"""Runs damaged model folders (tests/support/hostile_folders.py) through everything that a user does with one.

    python scripts/press/fuzz_checkpoints.py --count 400 --seed 0
    scripts/press/check_asan.sh scripts/press/fuzz_checkpoints.py --count 220 --memory-limit-mib 0 --time-limit-s 120

Each case must end in an error of ropewalk that says what and where, or in finite results (tests/support/front_door.py),
within limits on time and memory. Cases run in a process of their own, so that a crash or a hang is one of the results.
Prints a table by kind of damage and every case that ended otherwise; the exit status is 1 if there were any.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
STDERR_LINES = 30  # of a process that died, enough for a traceback or the head of a sanitizer's report


@dataclass(frozen=True)
class Result:
    """How one case ended. ends: error classes met, or "results"; failure: None, or what went wrong."""

    number: int
    kind: str
    ends: tuple[str, ...]
    seconds: float
    grown_bytes: int
    failure: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another corpus")
    parser.add_argument("--time-limit-s", type=float, default=20.0, help="per case")
    parser.add_argument("--memory-limit-mib", type=int, default=300, help="growth per case; 0: no limit")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options)
        return 0
    started = time.perf_counter()
    results = list(run_cases(options.first, options.first + options.count, lambda first: command(first, options)))
    print_table(results)
    failures = [result for result in results if result.failure is not None]
    for result in failures:
        print(f"\ncase {result.number} (seed {options.seed}, {result.kind}):\n{result.failure}")
    slowest = max(results, key=lambda result: result.seconds)
    largest = max(results, key=lambda result: result.grown_bytes)
    print(
        f"\n{len(results)} cases, {len(failures)} failures, {time.perf_counter() - started:.0f} s; "
        f"slowest {slowest.seconds:.1f} s (case {slowest.number}), "
        f"most memory {largest.grown_bytes >> 20} MiB (case {largest.number})"
    )
    return 1 if failures else 0


def command(first: int, options: argparse.Namespace) -> list[str]:
    """The command of a process that works from case `first` on."""
    count = options.first + options.count - first
    passed = {"first": first, "count": count, "seed": options.seed, "time-limit-s": options.time_limit_s}
    passed["memory-limit-mib"] = options.memory_limit_mib
    return [sys.executable, __file__, "--worker", *(f"--{name}={value}" for name, value in passed.items())]


def run_cases(first: int, last: int, command_from: Any) -> Iterator[Result]:
    """The results of cases first..last; a process that dies is replaced, its case is a failure."""
    while first < last:
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command_from(first), stdout=subprocess.PIPE, stderr=errors, text=True)
            kind = "?"
            for line in process.stdout:
                record = json.loads(line)
                if "started" in record:
                    kind = record["started"]
                    continue
                yield Result(**{**record, "ends": tuple(record["ends"])})
                first += 1
            status = process.wait()
            if first < last:
                errors.seek(0)
                report = "".join(errors.readlines()[:STDERR_LINES])
                yield Result(first, kind, ("died",), 0.0, 0, f"the process ended with status {status}\n{report}")
                first += 1


def work(options: argparse.Namespace) -> None:
    """Run cases in this process; a line of JSON before and after each."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "support"))
    import hostile_declarations  # noqa: F401  (registers the kinds)
    from hostile_folders import KINDS, make_case

    logging.disable(logging.CRITICAL)
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        for number in range(options.first, options.first + options.count):
            folder = root / str(number)
            emit({"started": list(KINDS)[number % len(KINDS)]})
            kind = make_case(number, options.seed, folder)
            emit({"number": number, "kind": kind, **run_case(folder, options)})
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run_case(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One folder through the front door, watched."""
    from front_door import walk

    before, failure, ends = peak_bytes(reset=True), None, ["failed"]
    started = time.perf_counter()
    faulthandler.dump_traceback_later(options.time_limit_s, exit=True)
    try:
        ends = walk(folder)
    except BaseException:
        failure = traceback.format_exc(limit=-6)
    faulthandler.cancel_dump_traceback_later()
    grown = max(0, peak_bytes() - before)
    if failure is None and 0 < options.memory_limit_mib << 20 < grown:
        failure = f"memory grew by {grown >> 20} MiB"
    return {"ends": ends, "seconds": time.perf_counter() - started, "grown_bytes": grown, "failure": failure}


def peak_bytes(reset: bool = False) -> int:
    """The most memory that this process has held since the last reset; after a reset, what it holds now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def emit(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def print_table(results: Sequence[Result]) -> None:
    """How many cases of each kind ended how; one case can meet several errors."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        table[result.kind].update(["cases", *result.ends] + (["failures"] if result.failure is not None else []))
    columns = sorted({end for counts in table.values() for end in counts} - {"cases", "failures"})
    width = max(map(len, table))
    columns = ["cases", "failures", *columns]
    print(" " * width, *columns, sep="  ")
    for kind, counts in sorted(table.items()):
        print(kind.ljust(width), *(str(counts[name] or "-").rjust(len(name)) for name in columns), sep="  ")


if __name__ == "__main__":
    sys.exit(main())
