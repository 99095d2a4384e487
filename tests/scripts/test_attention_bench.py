"""scripts/bench/attention.py runs, and has a line for each format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "attention.py"


def test_each_format_is_measured_beside_the_first() -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--threads", "1", "--formats", "f16", "q4"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in run.stdout.splitlines() if not line.startswith("#")]
    assert [line[:3] for line in lines[:4]] == [[kind, rows, "130"] for rows in ("1", "3") for kind in ("f16", "q4")]
    assert [line[0] for line in lines[4:]] == ["f16", "q4"]
    assert lines[0][5] == "1.00" and all(float(number) > 0 for line in lines[:4] for number in line[3:6])
