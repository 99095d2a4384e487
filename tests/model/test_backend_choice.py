"""model/backend_choice.py and model/backends.py: "auto" and the options that decide for it; what is refused by name."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk.backends.gpu import device as gpu
from ropewalk.base.errors import ConfigError
from ropewalk.model.backend_choice import Chosen, choose_backend
from ropewalk.model.backends import make_backend
from ropewalk.model.loader import load_model
from ropewalk.model.options import LoadOptions


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """With a card that lacks what is said, or nothing; or without one."""

    def has(card: bool, problem: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        if card:
            monkeypatch.setattr(gpu, "missing", lambda device: problem)
            monkeypatch.setattr(gpu, "describe", lambda device: "Card X")

    return has


def choice(**options) -> Chosen:
    return choose_backend(LoadOptions(**options))


def test_without_a_card_the_cpu_is_chosen_and_the_reason_is_said(machine) -> None:
    machine(card=False)
    assert choice() == Chosen("cpu", "torch sees no GPU")


def test_a_card_with_all_it_needs_is_chosen(machine) -> None:
    machine(card=True)
    assert choice() == Chosen("gpu", "this machine has Card X")
    assert choice(compute="exact").name == "gpu"


def test_a_card_that_lacks_something_leaves_the_model_to_the_cpu_and_says_what(machine) -> None:
    machine(card=True, problem="Triton 3.2.0 is too old")
    assert choice() == Chosen("cpu", "the GPU cannot be used: Triton 3.2.0 is too old")


@pytest.mark.parametrize(
    "option, why",
    [
        ({"threads": 2}, "threads=2 asks for it"),
        ({"isa": "avx2"}, "isa='avx2' asks for it"),
        ({"compute": "int8"}, "compute='int8' asks for it"),
        ({"device": "cpu"}, "device='cpu' asks for it"),
        ({"gpu_layers": 0}, "gpu_layers=0 asks for it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("card", [True, False])
def test_an_option_of_the_cpu_decides_for_it(machine, card: bool, option: dict, why: str) -> None:
    machine(card)
    assert choice(**option) == Chosen("cpu", why)


@pytest.mark.parametrize(
    "option",
    [{"device": "cuda:1"}, {"gpu_layers": 8}, {"gpu_split": "10,20"}, {"compute": "fp16"}],
    ids=lambda value: next(iter(value)),
)
def test_an_option_of_the_gpu_decides_for_it_and_never_falls_back(machine, option: dict) -> None:
    machine(card=False)
    assert choice(**option) == Chosen("gpu", "an option asks for it")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match='backend="gpu" cannot run on device'):
            make_backend(LoadOptions(**option))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backend": "gpu", "compute": "int8"}, 'compute=\'int8\' is arithmetic of backend="cpu"; backend="gpu"'),
        ({"backend": "cpu", "compute": "fp16"}, 'compute=\'fp16\' is arithmetic of backend="gpu"; backend="cpu"'),
        ({"threads": 2, "compute": "fp16"}, 'threads=2 is an option of backend="cpu"; leave it out for "gpu"'),
        ({"backend": "gpu", "threads": 2}, 'threads=2 is an option of backend="cpu"; leave it out for "gpu"'),
        ({"backend": "gpu", "gpu_layers": 0}, 'gpu_layers=0 leaves nothing for backend="gpu"'),
        ({"gpu_layers": 3, "compute": "fp16"}, "compute='fp16' is for the GPU alone, and gpu_layers leaves"),
        ({"device": "meta"}, 'device=\'meta\' needs backend="gpu" or "reference"'),
        ({"backend": "cpu", "gpu_split": "1"}, "gpu_split='1' is an option of backend=\"gpu\"; leave it out"),
    ],
)
def test_options_of_another_backend_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choice(**options)
    assert message in str(caught.value)


def test_threads_go_with_layers_that_are_left_to_the_cpu() -> None:
    assert choice(gpu_layers=3, threads=2).name == "gpu"


@pytest.mark.parametrize("name, compute", [("cpu", "int8"), ("reference", "int8")])
def test_a_backend_has_arithmetic_of_its_own_by_default(name: str, compute: str) -> None:
    assert make_backend(LoadOptions(backend=name)).compute == compute


def test_the_loading_line_says_which_backend_and_why(tmp_path: Path, machine, caplog: pytest.LogCaptureFixture) -> None:
    machine(card=False)
    write_checkpoint(tmp_path)
    caplog.set_level(logging.INFO, logger="ropewalk")
    load_model(tmp_path)
    assert caplog.messages[-1].endswith("backend cpu (torch sees no GPU), compute int8")
    load_model(tmp_path, backend="reference", compute="exact")
    assert caplog.messages[-1].endswith("backend reference, compute exact")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a card asks Triton")
def test_without_a_card_triton_is_never_imported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    program = (
        "import sys, ropewalk; model = ropewalk.load_model(sys.argv[1]); model.forward([1, 2], model.new_cache());"
        "found = [name for name in sys.modules if name.startswith(('triton', 'ropewalk.backends.gpu'))];"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
