"""How the cores and cards of the machines are shared among replicas. No Ray in here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from ropewalk.base.errors import ConfigError
from ropewalk.model.options import num_ranks


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine of the cluster offers, as Ray counts it."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """What each replica gets. threads: of its CPU backend, in each rank of a pipeline. cpus, gpus: what Ray sets aside
    for it."""

    threads: int
    cpus: float
    gpus: int


def share_of(args: argparse.Namespace, num_replicas: int, machines: Sequence[Machine]) -> Share:
    """The same for every replica: as many cores as leave room for all of them.

    args: --threads, --backend, --gpu-layers, --gpu-split and --pipeline of `ropewalk serve`. With fewer cores than
    replicas, several share one. The ranks of a pipeline are processes on the machine of their replica.

    Raises:
        ConfigError: there are no cores, or not enough cards; a wrong --pipeline.
    """
    cpus = _most_cpus(num_replicas, [machine.cpus for machine in machines])
    gpus = _cards(args, num_replicas, sum(machine.gpus for machine in machines))
    ranks = num_ranks(args.pipeline)
    threads = args.threads or max(1, int(cpus) // ranks)
    return Share(threads, min(float(threads * ranks), cpus), gpus)


def _most_cpus(num_replicas: int, cpus: Sequence[float]) -> float:
    """The most cores for each of so many replicas, none of which can be on two machines: whole ones if possible."""
    if not any(each > 0 for each in cpus):
        raise ConfigError("the machines of the cluster offer no CPUs: start Ray with --num-cpus")
    for share in range(int(max(cpus)), 0, -1):
        if sum(each // share for each in cpus) >= num_replicas:
            return float(share)
    parts = 1  # of one core
    while sum(each * parts // 1 for each in cpus) < num_replicas:
        parts += 1
    return 1.0 / parts


def _cards(args: argparse.Namespace, num_replicas: int, num_cards: float) -> int:
    """Cards of one replica: those of --gpu-split; one if it is to use any, or if there is one for each."""
    if args.gpu_split:
        needed = len(str(args.gpu_split).split(","))
    elif args.backend == "gpu" or args.gpu_layers:
        needed = 1
    else:
        return int(args.backend == "auto" and num_cards >= num_replicas)
    if needed * num_replicas > num_cards:
        raise ConfigError(
            f"{num_replicas} replicas with {needed} cards each need {needed * num_replicas}, and the cluster has "
            f"{num_cards:g}: give fewer --replicas, or --backend cpu"
        )
    return needed
