"""Which backend runs a model: as the options say, or with "auto" as this machine allows, with the reason.

    options -> the names of the backend and of its arithmetic, and why

An option that one backend alone understands decides for it under "auto". Nothing falls back: what was asked for by name
and cannot run here is refused. model/backends.py makes what is chosen here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ropewalk.base.errors import ConfigError
from ropewalk.model.options import LoadOptions

ARITHMETIC = {  # of each backend, its default first
    "cpu": ("int8", "exact"),
    "gpu": ("fp16", "exact"),
    "reference": ("int8", "exact"),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """The name of a backend; why: for the loading line, empty where it was asked for by name."""

    name: str
    why: str = ""


def choose_backend(options: LoadOptions) -> Chosen:
    """The backend that these options mean on this machine.

    Raises:
        ConfigError: options that contradict each other.
    """
    chosen = Chosen(options.backend) if options.backend != "auto" else _automatic(options)
    _check_options(options, chosen)
    return chosen


def arithmetic(options: LoadOptions) -> str:
    """What `compute` means for the backend of `choose_backend`.

    Raises:
        ConfigError: as `choose_backend`.
    """
    return compute_of(choose_backend(options).name, options)


def compute_of(name: str, options: LoadOptions) -> str:
    """What `compute` means for a backend of that name."""
    return ARITHMETIC[name][0] if options.compute == "auto" else options.compute


def _automatic(options: LoadOptions) -> Chosen:
    asked = _asks_for_cpu(options)
    if options.asks_for_gpu or _device_type(options) == "cuda":
        return Chosen("gpu", "an option asks for it")
    if asked is not None:
        return Chosen("cpu", f"{asked} asks for it")
    if not torch.cuda.is_available():
        return Chosen("cpu", "torch sees no GPU")
    from ropewalk.backends.gpu import device as gpu  # not at the top: most machines have none

    card = torch.device("cuda", torch.cuda.current_device())
    problem = gpu.missing(card)
    if problem is not None:
        return Chosen("cpu", f"the GPU cannot be used: {problem}")
    return Chosen("gpu", f"this machine has {gpu.describe(card)}")


def _asks_for_cpu(options: LoadOptions) -> str | None:
    """The first option that has a meaning on the CPU alone."""
    given: dict[str, Any] = {name: getattr(options, name) for name in ("threads", "isa", "expert_memory")}
    given |= {"compute": options.compute if options.compute == "int8" else None}
    given |= {"gpu_layers": options.gpu_layers, "device": _device_type(options)}
    return next((f"{name}={value!r}" for name, value in given.items() if value is not None), None)


def _device_type(options: LoadOptions) -> str | None:
    return None if options.device is None else str(options.device).split(":")[0]


def _check_options(options: LoadOptions, chosen: Chosen) -> None:
    """Refuse options of another backend than the chosen one."""
    name, mixed = chosen.name, options.gpu_layers is not None
    why = f" (chosen because {chosen.why})" if chosen.why else ""
    if options.compute not in ("auto", *ARITHMETIC[name]):
        wanted = next(other for other, values in ARITHMETIC.items() if options.compute in values)
        raise ConfigError(
            f'compute={options.compute!r} is arithmetic of backend="{wanted}"; backend="{name}"{why} computes in '
            f"{' or '.join(map(repr, ARITHMETIC[name]))}"
        )
    for option in ("threads", "isa"):
        value = getattr(options, option)
        if value is not None and name != "cpu" and not (name == "gpu" and mixed):
            raise ConfigError(f'{option}={value!r} is an option of backend="cpu"; leave it out for "{name}"')
    if options.pipeline is not None and (mixed or options.gpu_split is not None):
        raise ConfigError(
            f"pipeline={options.pipeline!r}: the processes of a pipeline compute in one place each: leave out "
            "gpu_layers and gpu_split"
        )
    if options.expert_memory is not None and name != "cpu":
        raise ConfigError(
            f'expert_memory={options.expert_memory!r} is an option of backend="cpu"; leave it out for "{name}"{why}'
        )
    for option in ("gpu_layers", "gpu_split"):
        value = getattr(options, option)
        if value and name != "gpu":
            raise ConfigError(f'{option}={value!r} is an option of backend="gpu"; leave it out for "{name}"')
    if name == "cpu" and _device_type(options) not in (None, "cpu"):
        raise ConfigError(
            f'device={str(options.device)!r} needs backend="gpu" or "reference"; backend="cpu" runs on the CPU only'
        )
    if name == "gpu" and options.gpu_layers == 0:
        raise ConfigError('gpu_layers=0 leaves nothing for backend="gpu": give a number from 1 on, or backend="cpu"')
    if name == "gpu" and mixed and options.compute == "fp16":
        raise ConfigError(
            "compute='fp16' is for the GPU alone, and gpu_layers leaves layers to the CPU: leave compute out (fp16 on "
            "the GPU, int8 on the CPU), or give 'exact'"
        )
