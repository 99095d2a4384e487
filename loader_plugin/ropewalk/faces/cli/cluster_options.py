"""Options of a server on several replicas: of `ropewalk serve --replicas` and of `serve run ropewalk.cluster:app`."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from ropewalk.base.errors import RequestError

LOCAL = "local"
ROUTING = ("prefix", "load")
SCALE_UP_S, SCALE_DOWN_S = 30.0, 600.0  # Ray's own: to load a model takes as long, and so do breaks between people
DRAIN_S = 300.0
MOST_REPLICAS = 1000


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """address: of the Ray cluster; "local" starts one. min_replicas, max_replicas: equal without autoscaling.

    routing: "prefix" or "load". target_running: replies at a replica beyond which there should be more replicas.
    scale_up_s, scale_down_s: how long that must be so. drain_s: how long a replica that is replaced may finish.
    """

    address: str
    min_replicas: int
    max_replicas: int
    routing: str
    target_running: int
    scale_up_s: float
    scale_down_s: float
    drain_s: float

    @property
    def scales(self) -> bool:
        """Whether the number of replicas follows the load."""
        return self.min_replicas < self.max_replicas


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group; see docs/cluster.md."""
    group = parser.add_argument_group("cluster", "several replicas of the model under Ray; needs the extra cluster")
    group.add_argument(
        "--replicas", metavar="N", help="so many replicas, or MIN-MAX: as many as the load needs (default: no cluster)"
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help=f"the cluster: {LOCAL} (start one on this machine; the default), auto (the one that this machine belongs "
        "to), or the HOST:PORT of its head",
    )
    group.add_argument(
        "--routing",
        choices=ROUTING,
        default=ROUTING[0],
        help="prefix: a conversation goes where its pages are, unless others wait there; load: where fewer wait "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--target-running",
        type=int,
        metavar="N",
        help="replies at each replica at which MIN-MAX stays as it is (default: --max-running)",
    )
    group.add_argument(
        "--scale-up-time",
        type=float,
        default=SCALE_UP_S,
        metavar="S",
        help="seconds of more load before there are more replicas (default: %(default)g)",
    )
    group.add_argument(
        "--scale-down-time",
        type=float,
        default=SCALE_DOWN_S,
        metavar="S",
        help="seconds of less load before there are fewer (default: %(default)g)",
    )
    group.add_argument(
        "--drain-time",
        type=float,
        default=DRAIN_S,
        metavar="S",
        help="seconds that a replica may finish its replies in when it is taken away (default: %(default)g)",
    )


def wants_cluster(args: argparse.Namespace) -> bool:
    """Whether the command asks for a cluster."""
    return args.replicas is not None or args.ray is not None


def check_no_cluster_options(args: argparse.Namespace) -> None:
    """For a server without a cluster.

    Raises:
        RequestError: an option that would have no effect.
    """
    unused = {
        "--routing": args.routing != ROUTING[0],
        "--target-running": args.target_running is not None,
        "--scale-up-time": args.scale_up_time != SCALE_UP_S,
        "--scale-down-time": args.scale_down_time != SCALE_DOWN_S,
        "--drain-time": args.drain_time != DRAIN_S,
    }
    given = [name for name, is_given in unused.items() if is_given]
    if given:
        raise RequestError(f"{' and '.join(given)}: without effect on one server: give --replicas N or MIN-MAX too")


def cluster_options(args: argparse.Namespace) -> ClusterOptions:
    """The options, checked.

    Raises:
        RequestError: one is out of range.
    """
    least, most = _replicas("1" if args.replicas is None else args.replicas)
    target = args.max_running if args.target_running is None else args.target_running
    if target < 1:
        raise RequestError(f"--target-running must be at least 1, got {target}")
    for name in ("scale_up_time", "scale_down_time", "drain_time"):
        if not 0 <= getattr(args, name) < float("inf"):  # NaN fails too
            raise RequestError(f"--{name.replace('_', '-')} must be at least 0 (seconds), got {getattr(args, name):g}")
    return ClusterOptions(
        LOCAL if args.ray is None else args.ray,
        least,
        most,
        args.routing,
        target,
        args.scale_up_time,
        args.scale_down_time,
        args.drain_time,
    )


def _replicas(text: str) -> tuple[int, int]:
    """N or MIN-MAX."""
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text, re.ASCII)
    least, most = (0, 0) if found is None else (int(found[1]), int(found[2] or found[1]))
    if not 1 <= least <= most <= MOST_REPLICAS:
        raise RequestError(f"--replicas must be N or MIN-MAX, from 1 to {MOST_REPLICAS}, got {text!r}")
    return least, most
