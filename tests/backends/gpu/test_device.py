"""backends/gpu/device.py: one clear sentence for whatever a card, a driver, Triton or a compiler lacks."""

from __future__ import annotations

import sys
import sysconfig
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ropewalk.backends.gpu import device as module
from ropewalk.backends.gpu.device import checked_device, describe, missing
from ropewalk.base.errors import ConfigError

CARD = torch.device("cuda", 0)
Properties = namedtuple("Properties", "name major minor total_memory")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """Makes torch and this machine look as if there were a card and all that it needs, but for what is said."""

    def as_if(capability=(8, 6), count=1, available=True, triton="3.4.0", compiler="/usr/bin/gcc", hip=None) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card X")
        properties = Properties("Card X", *capability, 24 << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setitem(sys.modules, "triton", None if triton is None else SimpleNamespace(__version__=triton))
        monkeypatch.setattr(module.shutil, "which", lambda name: compiler)
        monkeypatch.setattr(module.Path, "is_file", lambda path: True)

    return as_if


def test_a_card_with_all_it_needs_lacks_nothing(card) -> None:
    card()
    assert missing(CARD) is None
    assert checked_device(None) == checked_device("cuda") == CARD
    assert describe(CARD) == "Card X (capability 8.6, 24.0 GiB)"


@pytest.mark.parametrize(
    "lack, message",
    [
        ({"available": False}, "torch sees no card: there is none, its driver is missing, or it is too old"),
        ({"capability": (7, 5)}, r"Card X has compute capability 7.5, and 8.0 \(Ampere\) is needed"),
        ({"triton": None}, r"Triton cannot be imported .*pip install triton"),
        ({"triton": "3.2.0"}, "Triton 3.2.0 is too old, 3.3 is needed"),
        ({"compiler": None}, "Triton finds no C compiler for its launcher: install gcc or clang"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_missing_is_said_with_what_to_do(card, lack: dict, message: str) -> None:
    card(**lack)
    with pytest.raises(ConfigError, match=f"backend=\"gpu\" cannot run on device 'cuda': {message}"):
        checked_device("cuda")


def test_the_newest_versions_of_triton_are_not_taken_for_old_ones(card) -> None:
    for version in ("3.3.1", "3.10.0", "4.0.0+git1234"):
        card(triton=version)
        assert missing(CARD) is None


def test_a_card_that_is_not_there_is_refused_with_those_that_are(card) -> None:
    card(count=2)
    assert checked_device("cuda:1").index == 1
    with pytest.raises(ConfigError, match="torch sees 2 cards, cuda:0 to cuda:1"):
        checked_device("cuda:2")


def test_an_amd_card_has_no_compute_capability_to_compare(card) -> None:
    card(capability=(7, 5), hip="6.3")
    assert missing(CARD) is None


def test_a_build_of_torch_for_the_cpu_alone_is_named(card, monkeypatch: pytest.MonkeyPatch) -> None:
    card(available=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build for the CPU alone: install one for CUDA or ROCm" in missing(CARD)


def test_missing_headers_of_python_are_named(card, monkeypatch: pytest.MonkeyPatch) -> None:
    card()
    monkeypatch.setattr(module.Path, "is_file", lambda path: False)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    assert missing(CARD) == (
        f"Triton needs Python's headers for its launcher, and {header} is missing: install python3-dev"
    )


def test_the_cpu_runs_the_kernels_in_the_interpreter_alone(card, monkeypatch: pytest.MonkeyPatch) -> None:
    card()
    with pytest.raises(ConfigError, match="in Triton's interpreter alone: set TRITON_INTERPRET=1 before Python starts"):
        checked_device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert checked_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is set, which runs kernels on the CPU: unset it, or give"):
        checked_device("cuda")


@pytest.mark.parametrize("name", ["abacus", 3.5])
def test_a_device_that_torch_does_not_know_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match=f"device={name!r} cannot be used here"):
        checked_device(name)


def test_other_devices_of_torch_are_sent_to_the_reference() -> None:
    with pytest.raises(ConfigError, match='it is no CUDA or ROCm device; backend="reference" runs on any'):
        checked_device("meta")
