"""scripts/bench/load.py runs, and says where the time goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gptq_writer import write_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "load.py"


def test_loading_is_measured_beside_both_ways_of_reading(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--threads", "1", "--rounds", "1", "--parts"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in run.stdout.splitlines() if not line.startswith("#")]
    measured = {line[:37].strip(): float(line[37:].split()[0]) for line in lines}
    assert all(value >= 0 for value in measured.values())
    assert {"loading, s", "loading / reading them", "packing", "reading", "everything else"} <= set(measured)
    assert measured["loading, s"] > 0 and measured["loading / reading them"] > 0
