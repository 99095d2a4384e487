"""Whether a device can run the kernels; if not, what it lacks, in one sentence that says what to do.

Triton is imported here and nowhere earlier: the device itself is looked at first.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from ropewalk.base.errors import ConfigError
from ropewalk.base.memory import format_bytes

LEAST_CAPABILITY = (8, 0)  # matrix instructions with float16 and TF32 inputs, asynchronous copies: Ampere
LEAST_TRITON = (3, 3)
INTERPRETER = "TRITON_INTERPRET"  # Triton's own variable: its kernels then run in Python, on the CPU


def checked_device(device: str | torch.device | None) -> torch.device:
    """The device, "cuda" if None is given, with its number if it is a card.

    Raises:
        ConfigError: no such device, or something is missing here that the kernels need.
    """
    try:
        chosen = torch.device("cuda" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} cannot be used here: {error}") from error
    problem = missing(chosen)
    if problem is not None:
        raise ConfigError(f'backend="gpu" cannot run on device {str(chosen)!r}: {problem}')
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def missing(device: torch.device) -> str | None:
    """The first thing that is missing, and what to do about it; None if the kernels can run on the device."""
    checks: tuple[Callable[[torch.device], str | None], ...] = (_device_problem, triton_problem, _compiler_problem)
    found = (check(device) for check in checks)
    return next((problem for problem in found if problem is not None), None)


def describe(device: torch.device) -> str:
    """ "NVIDIA A100 (capability 8.0, 39.4 GiB)", or that the kernels are interpreted."""
    if device.type == "cpu":
        return "Triton's interpreter on the CPU"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name} (capability {found.major}.{found.minor}, {format_bytes(found.total_memory)})"


def is_interpreted() -> bool:
    """True if Triton's kernels run in Python; Triton decides when they are defined."""
    return os.environ.get(INTERPRETER, "").lower() in ("1", "true", "on", "yes")


def triton_problem(_: torch.device | None = None) -> str | None:
    """What is wrong with Triton."""
    try:
        version = import_module("triton").__version__
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton (on Windows: triton-windows)"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < LEAST_TRITON:
        return (
            f"Triton {version} is too old, {'.'.join(map(str, LEAST_TRITON))} is needed: update torch, or Triton alone"
        )
    return None


def _device_problem(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None if is_interpreted() else f"its kernels run on a CPU in Triton's interpreter alone: {_SET}"
    if device.type != "cuda":
        return 'it is no CUDA or ROCm device; backend="reference" runs on any device of torch'
    if is_interpreted():
        return f'{INTERPRETER} is set, which runs kernels on the CPU: unset it, or give device="cpu"'
    return _card_problem(device)


def _card_problem(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} is a build for the CPU alone: install one for CUDA or ROCm"
        return "torch sees no card: there is none, its driver is missing, or it is too old for this build of torch"
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        return f"torch sees {count} {'card' if count == 1 else 'cards'}, cuda:0 to cuda:{count - 1}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        name, needed = torch.cuda.get_device_name(device), ".".join(map(str, LEAST_CAPABILITY))
        return f"{name} has compute capability {'.'.join(map(str, capability))}, and {needed} (Ampere) is needed"
    return None


def _compiler_problem(device: torch.device) -> str | None:
    """Triton compiles a small C module that launches kernels, the first time that it runs."""
    if device.type == "cpu" or os.name == "nt":  # triton-windows brings a compiler
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler for its launcher: install gcc or clang, or name one in CC"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        return f"Triton needs Python's headers for its launcher, and {headers} is missing: install python3-dev"
    return None


_SET = f"set {INTERPRETER}=1 before Python starts"
