"""A replica: an engine of its own, behind the application of `ropewalk serve`, as a deployment of Ray Serve."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import uvicorn
from ray import serve

from ropewalk.base.errors import RopewalkError
from ropewalk.cluster.command import parsed
from ropewalk.cluster.places import KEY, URL, Route
from ropewalk.cluster.tickets import TicketCheck, Tickets, new_secret
from ropewalk.engine.engine import Engine
from ropewalk.faces.cli.serve import app_options, make_engine
from ropewalk.faces.server.app import create_app
from ropewalk.faces.server.launch import KEEP_ALIVE_S
from ropewalk.faces.server.uvicorn_server import GracefulServer
from ropewalk.generate.sampling import SamplingParams

PROBE_EVERY_S = 60.0  # a replica without work writes a token this often, to show that it can
STALLED_S = 300.0  # without a step, although replies run: a step of a large model and a long prompt may take a minute


@dataclass(frozen=True, slots=True)
class State:
    """How busy a replica is, as /health of a single server says it. process: its id on its machine. metrics: in
    Prometheus' format."""

    replica: str
    process: int
    running: int
    max_running: int
    waiting: int
    queue_limit: int
    metrics: str = ""


class Stalled(RopewalkError, RuntimeError):
    """The engine of a replica makes no step although it should."""


class Replica:
    """command_line: that of `ropewalk serve`, read on the machine of the replica; without keys and host names, which
    are checked in front. folder: where it was written, which relative paths start from. threads: of the CPU backend,
    unless the command line says."""

    async def __init__(self, command_line: Sequence[str], folder: str, threads: int) -> None:  # type: ignore[misc]
        if Path(folder).is_dir():
            os.chdir(folder)
        args = parsed(command_line)
        args.threads = args.threads or threads
        self._name = serve.get_replica_context().replica_id.unique_id
        self._engine = await asyncio.to_thread(make_engine, args)
        app = create_app(self._engine, replace(app_options(args), adapters=self._engine.model.adapters))
        self._service = app.state.service
        self._tickets = Tickets()
        self._key = new_secret()
        self._url = await self._listen(TicketCheck(app, self._tickets, self._key))
        self._health = EngineHealth(self._engine)

    def record_replica_metadata(self) -> dict[str, str]:
        """Called by Ray once this is made; told to all routers."""
        return {URL: self._url, KEY: self._key}

    async def admit(self, route: Route, ticket: str) -> None:
        """Returns when the request with this ticket has been answered: for as long, Ray counts it as ongoing here.

        route: for the router alone.
        """
        await self._tickets.wait(ticket)

    async def state(self, with_metrics: bool = False) -> State:
        """How busy it is."""
        queue = self._engine.queue
        limit = -1 if queue.limit is None else queue.limit
        metrics = self._service.metrics.text().decode() if with_metrics else ""
        return State(self._name, os.getpid(), queue.num_running, queue.num_turns, queue.num_waiting, limit, metrics)

    async def check_health(self) -> None:
        """Called by Ray; a replica that raises is replaced."""
        if self._serving.done():
            raise Stalled("the replica has stopped listening")
        await asyncio.to_thread(self._health.check)

    async def __del__(self) -> None:
        """Called by Ray once the requests are answered, or when the time for that is over."""
        if hasattr(self, "_server"):
            self._server.should_exit = True
            with suppress(Exception):  # the process ends next: there is nobody left to tell
                await self._serving

    async def _listen(self, app: TicketCheck) -> str:
        """Serve on a free port of this machine's address in the cluster."""
        host = ray.util.get_node_ip_address()
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S)
        self._server = GracefulServer(config, self._service)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


class EngineHealth:
    """Whether an engine answers: it makes steps while replies run, and without any it writes a token now and then."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lost_rank = threading.Event()
        engine.model.backend.when_failed(self._lost_rank.set)
        self._steps, self._changed_s = -1, time.monotonic()

    def check(self) -> None:
        """Raises:
        Stalled: replies run and no step was made for `STALLED_S`, or its pipeline has lost a rank. Also what goes
            wrong as the token is written.
        """
        if self._lost_rank.is_set():
            raise Stalled("a rank of the replica's pipeline was lost")
        now, steps = time.monotonic(), self._engine.scheduler.num_steps
        if steps != self._steps:
            self._steps, self._changed_s = steps, now
        elif self._engine.queue.num_running:
            if now - self._changed_s > STALLED_S:
                raise Stalled(
                    f"{self._engine.queue.num_running} replies run, and no step for {now - self._changed_s:.0f} s"
                )
        elif now - self._changed_s > PROBE_EVERY_S:
            self._engine.generate([0], SamplingParams(temperature=0, max_new_tokens=1))
