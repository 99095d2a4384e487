"""Makes the backend that was chosen (model/backend_choice.py), in one place or in several."""

from __future__ import annotations

import torch

from ropewalk.backends.protocol import Backend, ExpertRoom
from ropewalk.backends.reference import ReferenceBackend
from ropewalk.backends.split import Place, SplitBackend
from ropewalk.base.errors import ConfigError
from ropewalk.model.backend_choice import choose_backend, compute_of
from ropewalk.model.options import LoadOptions
from ropewalk.model.placement import Placement


def make_backend(
    options: LoadOptions, placement: Placement | None = None, experts: ExpertRoom | None = None
) -> Backend:
    """The backend of `choose_backend`, ready to pack weights. placement: of the layer instances, where there are more
    places than one. experts: how much memory those of a mixture may take, on the CPU.

    Raises:
        ConfigError: as `choose_backend`; or this machine lacks what the backend needs. NativeError: no compiled core.
    """
    name = choose_backend(options).name
    if placement is None:
        return _single(name, options, options.device, experts)
    places = [Place(_on_place(share.device, options), share.num_instances) for share in placement.shares]
    return SplitBackend(places, placement.weights_indices)


def _on_place(device: str | None, options: LoadOptions) -> Backend:
    """One of several backends. device: of the GPU backend; None: the CPU backend."""
    return _single("cpu" if device is None else "gpu", options, device)


def _single(
    name: str, options: LoadOptions, device: str | torch.device | None, experts: ExpertRoom | None = None
) -> Backend:
    compute = compute_of(name, options)
    if name == "reference":
        return ReferenceBackend(compute, _torch_device(device))
    if name == "gpu":
        from ropewalk.backends.gpu.device import checked_device

        card = checked_device(device)  # before the kernels, which need Triton
        from ropewalk.backends.gpu.backend import GpuBackend

        return GpuBackend(compute, card)
    from ropewalk.backends.cpu import CpuBackend  # not at the top: the reference runs without the compiled core

    return CpuBackend(compute, options.isa, options.threads, experts)


def _torch_device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device("cpu" if device is None else device)
        torch.empty(1, device=chosen).cpu()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        # torch raises a different error for an unknown name, an absent device, and a build without support for it
        raise ConfigError(f"device={device!r} cannot be used here: {error}") from error
    return chosen
