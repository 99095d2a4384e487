"""Everything that has to be seen on a card, one step after the other, in one command.

    python scripts/press/gpu_run.py OUT                              all steps, two hours or so
    python scripts/press/gpu_run.py OUT --steps kernels benchmark    some of them
    python scripts/press/gpu_run.py OUT --tiny                       without a card: does the run run?

    machine      what `ropewalk gpu` says of this machine (not with --tiny: it fails without a card)
    kernels      the tests of the backends, on the card
    fixtures     real quantisers' checkpoints: logits, greedy tokens, the same bits in chunks; likewise
    families     those of other architectures,
    containers   AWQ and compressed-tensors,
    codes        and those of `fixtures` with keys and values in four bits
    benchmark    scripts/bench/gpu.py: speeds beside this card's limits and what else is installed
    suite        all tests, with the backend that "auto" takes here

What a step prints goes to OUT/<step>.txt, and to standard output when it ends. A step that fails, or is cut off by
--limit, does not keep the others from running. Ends with a table, and with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
CHECK = "scripts/press/gpu_fixtures.py"
STEPS: dict[str, tuple[str, ...]] = {
    "machine": ("-m", "ropewalk", "gpu"),
    "kernels": (*PYTEST, "tests/backends"),
    "fixtures": (CHECK,),
    "families": (CHECK, "--of", "families"),
    "containers": (CHECK, "--of", "containers"),
    "codes": (CHECK, "--cache-type", "q4"),
    "benchmark": ("scripts/bench/gpu.py",),
    "suite": (*PYTEST, "-n", "4", "tests"),
}
FEW = ("--rows", "4", "--compute", "fp16")
TINY: dict[str, tuple[str, ...]] = {
    "kernels": (*PYTEST, "tests/backends/gpu/test_rows.py"),
    "fixtures": (*STEPS["fixtures"], "qwen2", *FEW),
    "families": (*STEPS["families"], "phi3-g4-32-act", *FEW),
    "containers": (*STEPS["containers"], "awq-gemm-g128", *FEW),
    "codes": (*STEPS["codes"], "qwen2", *FEW),
    "benchmark": (*STEPS["benchmark"], "--tiny"),
    "suite": (*PYTEST, "tests/test_public_interface.py"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for what the steps print")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--limit", type=float, help="seconds for each step (default: none)")
    parser.add_argument("--tiny", action="store_true", help="a little of each step, in Triton's interpreter")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    commands = TINY if args.tiny else STEPS
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if args.tiny else {}) | {"PYTHONUNBUFFERED": "1"}
    table = []
    for step in (step for step in args.steps if step in commands):
        print(f"\n## {step}", flush=True)
        started = time.monotonic()
        ended = run(commands[step], args.out / f"{step}.txt", args.limit, environment)
        table.append((step, ended, time.monotonic() - started))
    print()
    for step, ended, seconds in table:
        print(f"{step:12} {ended:16} {seconds:8.1f} s")
    return int(any(ended != "passed" for _, ended, _ in table))


def run(command: Sequence[str], log: Path, limit: float | None, environment: dict[str, str]) -> str:
    """Run a command of this Python, show what it printed, and say how it ended."""
    code: int | None = None
    with log.open("wb") as file, suppress(subprocess.TimeoutExpired):
        how = {"cwd": REPOSITORY, "env": environment, "stdout": file, "stderr": subprocess.STDOUT}
        code = subprocess.run([sys.executable, *command], timeout=limit, check=False, **how).returncode
    print(log.read_text(encoding="utf-8", errors="replace"), end="", flush=True)
    return "cut off" if code is None else "passed" if code == 0 else f"failed ({code})"


if __name__ == "__main__":
    sys.exit(main())
