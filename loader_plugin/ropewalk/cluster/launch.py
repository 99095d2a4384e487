"""`ropewalk serve --replicas N`: this process is the server in front, and ends the replicas when it ends."""

from __future__ import annotations

import argparse
import logging
import re
import socket
from collections.abc import Sequence
from dataclasses import replace

import uvicorn
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from ropewalk.base.errors import ConfigError, brief
from ropewalk.base.listening import bound_socket
from ropewalk.cluster.access import ReplicaAccess
from ropewalk.cluster.address import joined_cluster
from ropewalk.cluster.deploy import REPLICAS, replicas_of
from ropewalk.cluster.front import create_front
from ropewalk.faces.cli.cluster_options import ClusterOptions
from ropewalk.faces.cli.serve import app_options
from ropewalk.faces.cli.terminal import note
from ropewalk.faces.server.app import AppOptions
from ropewalk.faces.server.hosts import is_loopback
from ropewalk.faces.server.launch import KEEP_ALIVE_S, checked_hosts, show_requests, url_host

APPLICATION = "ropewalk"
OURS = re.compile(r"ropewalk\.base\.errors\.\w+: (.+)")


class FrontServer(uvicorn.Server):
    """On shutdown, finishes what runs and refuses what comes. A second Ctrl-C cuts replies off."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S))
        self._front = app.state.front

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once it is asked to end."""
        self._front.draining = True
        await super().shutdown(sockets)


def serve_on_cluster(args: argparse.Namespace, options: ClusterOptions) -> int:
    """Run the server until it is told to end; returns the exit code.

    Raises:
        ConfigError: the address is taken, there is no cluster, or the replicas do not start, with their reason.
    """
    told = app_options(args)
    with bound_socket(args.host, args.port) as listener, joined_cluster(options.address):
        at, port = listener.getsockname()[:2]
        told = replace(told, allowed_hosts=checked_hosts(told.allowed_hosts, args.host, at))
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            handle = start_replicas(args.command_line[1:], args, options)
            show_requests()
            is_open = not is_loopback(at) and not told.api_keys
            listener.listen()  # whoever reads the URL below and comes at once has to wait a moment, and is not refused
            note(_banner(args, told, options, f"http://{url_host(at)}:{port}/v1", is_open))
            FrontServer(create_front(ReplicaAccess(handle), told)).run(sockets=[listener])
        finally:
            serve.delete(APPLICATION)
    return 0


def start_replicas(
    command_line: Sequence[str], args: argparse.Namespace, options: ClusterOptions, name: str = APPLICATION
) -> DeploymentHandle:
    """Deploy the replicas as the application `name`, which replaces what it was step by step; waits until they answer.

    Raises:
        ConfigError: they do not start.
    """
    serve.start(proxy_location="Disabled")
    try:
        serve.run(replicas_of(list(command_line), args, options), name=name, route_prefix=None)
    except RuntimeError as error:
        raise ConfigError(f"the replicas did not start: {_reason(name, error)}") from error
    return serve.get_deployment_handle(REPLICAS, name)


def _reason(name: str, error: RuntimeError) -> str:
    """What a replica said, if it was an error of ours; otherwise what Ray says."""
    status = serve.status().applications.get(name)
    told = [error, *([deployment.message for deployment in status.deployments.values()] if status else [])]
    ours = [found for text in told for found in OURS.findall(str(text))]
    return brief(ours[-1] if ours else told[-1], 1000)


def _banner(args: argparse.Namespace, told: AppOptions, options: ClusterOptions, url: str, is_open: bool) -> str:
    number = str(options.max_replicas)
    if options.scales:
        number = f"{options.min_replicas} to {number}, for {options.target_running} replies each"
    lines = {
        "URL": url,
        "model": told.base,
        "replicas": f"{number}; routed by {options.routing}",
        "replies": f"{args.max_running} at once at each; {args.queue_limit} requests may wait",
        "API key": "needed" if told.api_keys else "none",
        "web pages": ", ".join(told.cors_origins),
    }
    rows = [f"  {name:<9} {value}" for name, value in lines.items() if value]
    if is_open:
        rows.append("  warning: anyone who reaches this address can use the model: give --api-key KEY")
    return "\n".join(["", "ropewalk serve", *rows, "  Ctrl-C ends it after the running replies (twice: at once)", ""])
