"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ropewalk.base.errors import ConfigError, brief
from ropewalk.faces.cli.cluster_options import LOCAL

AUTO = "auto"
PATIENCE_S = 5.0  # for the head to answer


@contextmanager
def joined_cluster(address: str) -> Iterator[None]:
    """While in the `with` block, this process belongs to the cluster; one that it started ends with the block.

    A process that belongs to a cluster already stays in it.

    Raises:
        ConfigError: there is no cluster at this address.
    """
    if ray.is_initialized():
        yield
        return
    _check(address)
    if address == LOCAL:
        # Read by Ray alone. What a person starts on the own machine tells nobody; and replicas have the priority that a
        # server alone has: Ray would have them give way to everything else.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        options = {"include_dashboard": False} if address == LOCAL else {}
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Refuse what is no address, and one where nobody listens: Ray itself would try for a minute."""
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--ray must be {LOCAL}, {AUTO} or HOST:PORT of the head of a cluster, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or error) from error


def _no_cluster(address: str, reason: object) -> ConfigError:
    return ConfigError(
        f"--ray {address}: there is no Ray cluster that this machine could join ({brief(reason)}): start its head with "
        f"`ray start --head`, join with `ray start --address HOST:PORT`, or give --ray {LOCAL}"
    )
