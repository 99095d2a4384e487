"""A Ray cluster of several nodes on this machine: replicas of the embedded model, and the server in front of them."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

import ropewalk.cluster
from ropewalk.cluster.access import ReplicaAccess
from ropewalk.cluster.command import parsed
from ropewalk.cluster.deploy import REPLICAS
from ropewalk.cluster.front import create_front
from ropewalk.cluster.launch import APPLICATION, FrontServer, start_replicas
from ropewalk.cluster.replica import State
from ropewalk.faces.cli.cluster_options import cluster_options
from ropewalk.faces.cli.serve import app_options
from server_runner import PATIENCE_S, until

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class RunningCluster:
    """url: of the server in front. The model is the embedded one, with one thread a replica."""

    def __init__(self, cluster: Cluster, num_replicas: int) -> None:
        self._cluster = cluster
        with socket.create_server(("127.0.0.1", 0)) as free:
            proxy_port = free.getsockname()[1]
        self.deployed_url = f"http://127.0.0.1:{proxy_port}"
        serve.start(http_options={"host": "127.0.0.1", "port": proxy_port})
        line = ["--threads=1", f"--replicas={num_replicas}"]
        args = parsed(line)
        handle = start_replicas(line, args, cluster_options(args))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._access = ReplicaAccess(handle)
        self._server = FrontServer(create_front(self._access, app_options(args)))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)

    def deploy_with_front(self, num_replicas: int, options: dict[str, Any]) -> None:
        """Other replicas, with a server in front of them that is a deployment too: at `deployed_url`, key "secret"."""
        common = {"threads": 1, "replicas": num_replicas, "api_key": "secret"}
        serve.run(ropewalk.cluster.app(common | options), name=APPLICATION, route_prefix="/")

    def add_node(self) -> None:
        """One machine more."""
        self._cluster.add_node(**NODE)

    def states(self) -> list[State]:
        """How busy each replica is, by Ray's way to them."""
        return asyncio.run(ReplicaAccess(serve.get_deployment_handle(REPLICAS, APPLICATION)).states())

    def health(self, url: str) -> dict[str, Any]:
        """What a server in front says."""
        return httpx.get(f"{url}/health", timeout=PATIENCE_S).json()

    def metrics(self) -> dict[str, float]:
        """All numbers, by name and labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def end(self) -> None:
        """End the server in front."""
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server did not end"
        self._socket.close()


@contextmanager
def running_cluster(num_nodes: int, num_replicas: int) -> Iterator[RunningCluster]:
    """Started, and ended with all of its processes."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        for _ in range(num_nodes - 1):
            cluster.add_node(**NODE)
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        running = RunningCluster(cluster, num_replicas)
        try:
            yield running
        finally:
            running.end()
            serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
