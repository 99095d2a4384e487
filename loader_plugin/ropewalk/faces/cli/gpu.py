"""`ropewalk gpu`: what this machine has and lacks for the GPU backend; `ropewalk gpu warm-up`: compile ahead."""

from __future__ import annotations

import argparse

from ropewalk.faces.cli.loading import load
from ropewalk.faces.cli.options import add_load_arguments, add_model_arguments
from ropewalk.faces.cli.terminal import note, progress_bar


def add_gpu_command(commands: argparse._SubParsersAction) -> None:
    """Register the command and its action."""
    gpu = commands.add_parser("gpu", help="what this machine has for the GPU backend", description=run_gpu.__doc__)
    gpu.set_defaults(run=run_gpu)
    actions = gpu.add_subparsers(title="actions", metavar="ACTION")
    warm = actions.add_parser("warm-up", help="compile the kernels of a model ahead", description=run_warm_up.__doc__)
    add_model_arguments(warm)
    add_load_arguments(warm, backend="gpu")
    warm.set_defaults(run=run_warm_up, adapter=[])


def run_gpu(args: argparse.Namespace) -> int:
    """Name the cards, what each lacks, and what backend "auto" would take. Ends with 1 if no card can be used."""
    import torch

    from ropewalk.backends.gpu.device import describe, missing, triton_problem
    from ropewalk.model.backend_choice import choose_backend
    from ropewalk.model.options import LoadOptions

    print(f"torch {torch.__version__}; Triton: {triton_problem() or 'ready'}")
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    problems = {device: missing(device) for device in devices or [torch.device("cuda")]}
    for device, problem in problems.items():
        name = f"{describe(device)}: " if device in devices else ""
        print(f"{device}: {name}{problem or 'ready'}")
    chosen = choose_backend(LoadOptions())
    print(f'backend "auto" takes "{chosen.name}": {chosen.why}')
    return int(all(problems.values()))


def run_warm_up(args: argparse.Namespace) -> int:
    """Load a model and run it once in every way that has kernels of its own. Triton keeps what it compiles, so that
    later starts with a model of the same shapes wait for nothing."""
    from ropewalk.model.warm_up import warm_up

    model, _ = load(args)
    with progress_bar("compiling", "step") as progress:
        steps = warm_up(model, progress)
    note(f"{steps} steps have run on {model.backend.name} ({model.backend.device})")
    return 0
