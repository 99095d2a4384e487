"""`torchrun -m ropewalk COMMAND ...`: rank 0 runs the command, the other ranks run layers for it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from ropewalk.base.errors import ConfigError


def is_under_torchrun() -> bool:
    """Whether torchrun has started this process; said without importing torch."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_under_torchrun(parse: Callable[[], argparse.Namespace], run: Callable[[argparse.Namespace], int]) -> int:
    """parse, run: the command line, for rank 0. Returns the exit code of this rank.

    A command that loads a model loads it as a pipeline over all ranks, whether --pipeline is given or not.

    Raises:
        ConfigError: the environment is not as torchrun makes it; a command for a cluster.
        RankError: the ranks do not find each other.
    """
    from ropewalk.model.pipeline.machine import torchrun_seat
    from ropewalk.model.pipeline.meeting import Meeting
    from ropewalk.model.pipeline.process import serve_layers

    seat = torchrun_seat()
    if seat is None:
        return run(parse())
    if seat.rank:
        return serve_layers(Meeting.under_torchrun(seat))
    try:
        args = parse()
        if getattr(args, "replicas", None) or getattr(args, "ray", None):
            raise ConfigError(
                "torchrun has started the ranks of one pipeline, and --replicas and --ray ask for several models: "
                "start the command without torchrun; with --pipeline each replica starts ranks of its own"
            )
        if getattr(args, "pipeline", "") is None:
            args.pipeline = str(seat.size)
        return run(args)
    finally:
        Meeting.under_torchrun(seat).finish()
