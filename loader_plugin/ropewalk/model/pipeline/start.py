"""Rank 0's side of the start: other ranks are started on this machine, or torchrun has started them.

counts of layer instances -> ranks connect -> each is told its layers -> the backend that speaks for all of them
"""

from __future__ import annotations

import logging
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ropewalk.backends.pipeline.backend import PipelineBackend
from ropewalk.backends.pipeline.chain import Chain
from ropewalk.backends.pipeline.messages import Load
from ropewalk.backends.pipeline.shares import Shares
from ropewalk.backends.pipeline.watch import Watch
from ropewalk.backends.protocol import ExpertRoom, OnePlace
from ropewalk.base.errors import ConfigError, RankError
from ropewalk.config.instances import instances_of
from ropewalk.model.backend_choice import choose_backend
from ropewalk.model.backends import make_backend
from ropewalk.model.options import LoadOptions
from ropewalk.model.pipeline.balance import choose_counts
from ropewalk.model.pipeline.machine import Seat, threads_of, torchrun_seat
from ropewalk.model.pipeline.meeting import Meeting
from ropewalk.model.plan import LoadPlan

logger = logging.getLogger(__name__)

ENDING_S = 5.0  # that ranks may take to end by themselves


def start_pipeline(folder: Path, plan: LoadPlan, options: LoadOptions, experts: ExpertRoom | None) -> PipelineBackend:
    """The backend of a pipeline whose ranks read their layers from now on.

    Raises:
        ConfigError: more ranks than layer instances, or not as many as torchrun has started.
        RankError: a rank cannot be started or reached.
    """
    counts = choose_counts(folder, plan, options)
    seat = torchrun_seat()
    if seat is not None and (seat.rank != 0 or seat.size != len(counts)):
        raise ConfigError(
            f"pipeline={options.pipeline!r} is {len(counts)} ranks with rank 0 here, and torchrun has started "
            f"{seat.size} and this is rank {seat.rank}: leave pipeline out under torchrun, or give it as many; rank 0 "
            "loads the model"
        )
    home = _home(options, seat or Seat(0, len(counts), 0, len(counts)), _part(experts, counts))
    shares = Shares.of_counts(counts)
    names = _names(counts)
    chain = _torchrun_chain(seat, names) if seat is not None else _local_chain(len(counts), names)
    indices = [use.weights_index for use in instances_of(plan.order, plan.config.num_layers)]
    backend = PipelineBackend(home, chain, shares, indices)
    weakref.finalize(backend, chain.close)  # when the model goes, and when the program ends
    num_layers = plan.config.num_layers + (0 if plan.second is None else plan.second.num_layers)
    layers = [backend.layers_of(rank, num_layers) for rank in range(len(counts))]
    chain.send_(_load_message(folder, options, home, layers, list(shares.firsts), names, experts))
    logger.info("layer instances of the %d ranks of the pipeline: %s", len(counts), ", ".join(map(str, counts)))
    return backend


def _home(options: LoadOptions, seat: Seat, experts: ExpertRoom | None) -> OnePlace:
    """The backend of rank 0, with its part of the cores."""
    if choose_backend(options).name == "cpu":
        options = replace(options, backend="cpu", threads=threads_of(options.threads, seat))
    return make_backend(options, None, experts)


def _part(experts: ExpertRoom | None, counts: list[int]) -> ExpertRoom | None:
    if experts is None:
        return None
    return ExpertRoom(experts.num_bytes * counts[0] // sum(counts), experts.part)


def _names(counts: list[int]) -> list[str]:
    """Ranks with what they run, for messages."""
    names, first = [], 0
    for rank, count in enumerate(counts):
        runs = f"layer instances {first} to {first + count - 1}" if count else "no layer instances"
        names.append(f"rank {rank} of {len(counts)} ({runs})")
        first += count
    return names


def _load_message(
    folder: Path,
    options: LoadOptions,
    home: OnePlace,
    layers: list[list[int]],
    firsts: list[int],
    names: list[str],
    experts: ExpertRoom | None,
) -> Load:
    """All that decides bits is as rank 0 has it, be it chosen or asked for."""
    return Load(
        folder=str(folder.resolve()),
        second_folder="" if options.second_folder is None else str(Path(options.second_folder).resolve()),
        backend=home.name,
        compute=home.compute,
        isa=str(home.load_options.get("isa") or ""),
        device="" if options.device is None else str(options.device),
        threads=options.threads or 0,
        layers=layers,
        firsts=firsts,
        names=names,
        expert_bytes=-1 if experts is None else experts.num_bytes,
        expert_part=1.0 if experts is None else float(experts.part),
    )


def _torchrun_chain(seat: Seat, names: list[str]) -> Chain:
    meeting = Meeting.under_torchrun(seat)
    if meeting.has_begun:
        raise ConfigError("the ranks that torchrun has started serve one model, and that was loaded before")
    return _chain(meeting, names, lambda: None, meeting.finish)


def _local_chain(size: int, names: list[str]) -> Chain:
    meeting, port = Meeting.hosted(size)
    children = [_start_child(rank, size, port) for rank in range(1, size)]

    def end() -> None:
        meeting.finish()
        _end(children)

    try:
        return _chain(meeting, names, lambda: _check_alive(children), end)
    except BaseException:
        _end(children)
        raise


def _chain(meeting: Meeting, names: list[str], check: Callable[[], None], on_end: Callable[[], None]) -> Chain:
    chain = Chain(meeting.gather(check), on_end)
    others = range(1, meeting.seat.size)
    chain.begin(Watch(meeting.beats, 0, others, lambda rank: names[rank], chain.failed))
    return chain


def _start_child(rank: int, size: int, port: int) -> subprocess.Popen:
    """In a session of its own: Ctrl-C is for rank 0, which ends the others when it is done."""
    arguments = [f"--{name}={value}" for name, value in (("rank", rank), ("size", size), ("port", port))]
    program = [sys.executable, "-m", "ropewalk.model.pipeline.process", *arguments]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def _check_alive(children: list[subprocess.Popen]) -> None:
    for rank, child in enumerate(children, 1):
        if child.poll() is not None:
            raise RankError(
                f"rank {rank} of the pipeline ended while it was started, with exit code {child.returncode}"
            )


def _end(children: list[subprocess.Popen]) -> None:
    """Wait for them, and end those that hang."""
    for child in children:
        try:
            child.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdin is not None:
            child.stdin.close()
