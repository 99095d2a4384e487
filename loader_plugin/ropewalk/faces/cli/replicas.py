"""`ropewalk serve`, here or on a cluster: the second is in the room `cluster` and needs the extra of that name."""

from __future__ import annotations

import argparse

from ropewalk.base.errors import UnsupportedError
from ropewalk.faces.cli.cluster_options import (
    add_cluster_arguments,
    check_no_cluster_options,
    cluster_options,
    wants_cluster,
)
from ropewalk.faces.cli.serve import run_serve


def add_replicas(parser: argparse.ArgumentParser) -> None:
    """Give the command `serve` the options of a cluster."""
    add_cluster_arguments(parser)
    parser.set_defaults(run=run_here_or_on_cluster)


def run_here_or_on_cluster(args: argparse.Namespace) -> int:
    """As `run_serve`; with --replicas or --ray on several replicas."""
    if not wants_cluster(args):
        check_no_cluster_options(args)
        return run_serve(args)
    options = cluster_options(args)
    try:
        from ropewalk.cluster.launch import serve_on_cluster
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"--replicas and --ray need the package {error.name}: pip install 'ropewalk[cluster]'"
        ) from error
    return serve_on_cluster(args, options)
