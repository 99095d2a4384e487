"""scripts/press/gpu_run.py: one step after the other, whatever becomes of them, and a table at the end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "press"))

import gpu_run


def test_each_step_runs_and_the_table_says_how_it_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "machine": ("-c", "print('a card')"),
        "kernels": ("-c", "import sys; sys.exit('a test failed')"),
        "benchmark": ("-c", "import time; print('begun', flush=True); time.sleep(60)"),
    }
    monkeypatch.setattr(gpu_run, "STEPS", gpu_run.STEPS | programs)
    assert gpu_run.main([str(tmp_path / "out"), "--steps", *programs, "--limit", "3"]) == 1
    *_, machine, kernels, benchmark = capsys.readouterr().out.splitlines()
    assert machine.split()[:2] == ["machine", "passed"]
    assert kernels.split()[:3] == ["kernels", "failed", "(1)"]
    assert benchmark.split()[:3] == ["benchmark", "cut", "off"]
    printed = {path.stem: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert printed == {"machine": "a card\n", "kernels": "a test failed\n", "benchmark": "begun\n"}


def test_a_step_runs_without_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    assert gpu_run.main([str(tmp_path), "--tiny", "--steps", "machine", "kernels"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["kernels", "passed"]
    assert set(gpu_run.TINY) == set(gpu_run.STEPS) - {"machine"}
