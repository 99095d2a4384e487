"""Kernels of one instruction set leak nothing into the rest of the module (scripts/press/check_symbols.sh)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "press" / "check_symbols.sh"

pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("nm", "c++filt", "g++", "bash")), reason="needs g++ and binutils"
)


def check(*arguments: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment)


def compiled(folder: Path, source: str) -> Path:
    (folder / "table.cpp").write_text(source)
    subprocess.run(["g++", "-std=c++20", "-c", "table.cpp", "-o", "table.o"], cwd=folder, check=True)
    return folder / "table.o"


def test_every_instruction_set_exports_its_kernel_table_alone():
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    result = check()
    assert result.returncode == 0, result.stderr
    names = {line.split(":")[0].rpartition("_")[2] for line in result.stdout.splitlines()}
    assert "scalar.a" in names and result.stdout.count("exports its kernel table alone") == len(names)


TABLE = "namespace ropewalk::{isa} {{ int kernel_table() {{ return {value}; }} }}\n"


@pytest.mark.parametrize(
    "source, symbol",
    [
        ("inline int shared(int x) { return x; }\n" + TABLE.format(isa="avx2", value="shared(1)"), "shared(int)"),
        ("#include <algorithm>\n" + TABLE.format(isa="avx2", value="std::min(1, 2)"), "std::min"),
        ("int helper() { return 1; }\n" + TABLE.format(isa="avx2", value="helper()"), "helper()"),
        ("int elsewhere();\n" + TABLE.format(isa="avx2", value="elsewhere()"), "elsewhere()"),
        ("namespace { int alone = 1; }\nint other = alone;\n", "defines 0 kernel tables"),
    ],
    ids=["inline", "standard-template", "exported", "wanted-from-elsewhere", "no-table"],
)
def test_the_check_finds(tmp_path, source, symbol):
    result = check(compiled(tmp_path, source))
    assert result.returncode == 1
    assert symbol in result.stderr


def test_the_check_passes_a_table_with_local_helpers(tmp_path):
    source = "namespace { int alone(int x) { return x; } }\n" + TABLE.format(isa="avx512", value="alone(1)")
    result = check(compiled(tmp_path, source))
    assert result.returncode == 0, result.stderr
