"""scripts/bench/experts.py runs: with all experts in memory, with some, and with the files forgotten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "experts.py"


def test_a_mixture_is_measured_in_memory_and_from_its_files() -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "--threads", "1", "--parts", "0.6", "--cold"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in run.stdout.splitlines() if not line.startswith("#")]
    for title in ("decode, share of the bandwidth", "prompt of 16, tokens/s", "  read for a token, MB"):
        (line,) = (line for line in lines if line.startswith(title))
        assert float(line.removeprefix(title).split()[0]) > 0, line
    assert any(line.startswith("a token reads") and "4 of 16 experts in 2 layers" in line for line in lines)
    assert any(line.startswith("from the disk, tokens/s") for line in lines)
