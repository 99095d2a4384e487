"""What Ray Serve is given: the deployment of the replicas, and that of the server in front of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from ropewalk.base.errors import ConfigError
from ropewalk.cluster.access import ReplicaAccess
from ropewalk.cluster.command import command_line_of, of_replica, parsed
from ropewalk.cluster.front import create_front
from ropewalk.cluster.replica import Replica
from ropewalk.cluster.shares import Machine, share_of
from ropewalk.faces.cli.cluster_options import ClusterOptions, cluster_options
from ropewalk.faces.cli.serve import app_options

REPLICAS = "Replicas"
ROUTER = "ropewalk.cluster.router.ReplicaRouter"
MOST_UNPLACED = 1000  # requests that wait in front because every replica is full
NO_LIMIT = 100_000  # requests at once, as far as Ray is concerned: the router and the engines have limits of their own
HEALTH_EVERY_S, HEALTH_WITHIN_S = 10.0, 60.0
TRIES = 1  # to load a model: what failed for its files or its memory will fail again


def fronted(arguments: Mapping[str, Any]) -> serve.Application:
    """The replicas with a server in front of them, for Ray's own proxies. arguments: see `command.command_line_of`."""
    line = command_line_of(arguments)
    args = parsed(line)
    options = app_options(args)

    def front() -> FastAPI:
        name = serve.get_replica_context().app_name
        return create_front(ReplicaAccess(serve.get_deployment_handle(REPLICAS, name)), options)

    @serve.deployment(max_ongoing_requests=NO_LIMIT, ray_actor_options={"num_cpus": 0})
    @serve.ingress(front)
    class Front:
        """The server in front. replicas: named so that they belong to the application."""

        def __init__(self, replicas: DeploymentHandle) -> None:
            self._replicas = replicas

    return Front.bind(replicas_of(line, args, cluster_options(args)))


def replicas_of(command_line: list[str], args: argparse.Namespace, options: ClusterOptions) -> serve.Application:
    """The replicas alone. command_line: what `args` was read from; each replica reads it on its own machine.

    Raises:
        ConfigError: as for `shares.share_of`; this process belongs to no cluster.
    """
    routing = {"routing": options.routing, "most_requests": args.max_running + args.queue_limit}
    share = share_of(args, options.max_replicas, _machines())
    deployment = serve.deployment(
        Replica,
        name=REPLICAS,
        ray_actor_options={"num_cpus": share.cpus, "num_gpus": share.gpus},
        max_ongoing_requests=NO_LIMIT,
        max_queued_requests=MOST_UNPLACED,
        health_check_period_s=HEALTH_EVERY_S,
        health_check_timeout_s=HEALTH_WITHIN_S,
        graceful_shutdown_timeout_s=options.drain_s,
        max_constructor_retry_count=TRIES,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER, request_router_kwargs=routing),
        **_number(options),
    )
    return deployment.bind(tuple(of_replica(command_line)), os.getcwd(), share.threads)


def _number(options: ClusterOptions) -> dict[str, Any]:
    """How many replicas, as arguments of a deployment."""
    if not options.scales:
        return {"num_replicas": options.max_replicas}
    scaling = AutoscalingConfig(
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        target_ongoing_requests=options.target_running,
        upscale_delay_s=options.scale_up_s,
        downscale_delay_s=options.scale_down_s,
    )
    return {"autoscaling_config": scaling}


def _machines() -> list[Machine]:
    if not ray.is_initialized():
        raise ConfigError("this process belongs to no Ray cluster: call ray.init() first")
    offered = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Machine(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in offered]
