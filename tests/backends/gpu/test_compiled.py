"""What the kernels become on a card of the kind that most people have, compiled without one: the limits hold.

scripts/press/gpu_compile_matrix.py, in a process of its own: here Triton's kernels are functions of its interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "press" / "gpu_compile_matrix.py"
KERNELS = (
    "linear w4g128",
    "linear of experts w4g128 decode",
    "dense fp16 16",
    "attention D128 long",
    "norm 4096",
    "rotate and append",
    "D64 chunks q4",
    "turn heads",
)


def compiled(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed, which compiles the kernels")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="triton's tools are programs for Linux")
def test_kernels_keep_within_registers_and_memory_without_spills_or_atomics(tmp_path: Path) -> None:
    table = tmp_path / "table.txt"
    done = compiled("--target", "sm_86", "--only", *KERNELS, "--out", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = table.read_text().splitlines()
    assert lines[-1] == "0 beyond the limits"
    for kernel in KERNELS:
        assert any(kernel in line for line in lines), kernel
    decode = next(line for line in lines if "linear w4g128 decode" in line)
    assert " HMMA " in decode
