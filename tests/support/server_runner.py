"""The real server on a free port, in a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from ropewalk.engine.engine import Engine
from ropewalk.faces.server.app import AppOptions, Service, create_app
from ropewalk.faces.server.uvicorn_server import GracefulServer

PATIENCE_S = 30.0


class RunningServer:
    """Serves an engine while in a `with` block, and ends gracefully after it."""

    def __init__(self, engine: Engine, options: AppOptions) -> None:
        app = create_app(engine, options)
        self.service: Service = app.state.service
        self.key = options.api_keys[0] if options.api_keys else "none"
        self._server = GracefulServer(uvicorn.Config(app, log_level="warning", access_log=False), self.service)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    @property
    def client(self) -> openai.OpenAI:
        """The official client, which does not try again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=PATIENCE_S)

    def get(self, path: str) -> httpx.Response:
        """A plain GET with the key."""
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {self.key}"}, timeout=PATIENCE_S)

    def post(self, path: str, json: Any) -> httpx.Response:
        """A plain POST with the key."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.post(self.url + path, json=json, headers=headers, timeout=PATIENCE_S)

    def delete(self, path: str) -> httpx.Response:
        """A plain DELETE with the key."""
        return httpx.delete(self.url + path, headers={"Authorization": f"Bearer {self.key}"}, timeout=PATIENCE_S)

    def metric(self, name: str) -> float:
        """A number without labels, or with exactly those written behind its name."""
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)

    def begin_to_end(self) -> None:
        """What Ctrl-C does."""
        self._server.should_exit = True

    def signal(self, number: int) -> None:
        """What that signal does."""
        self._server.handle_exit(number, None)

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(timeout=PATIENCE_S)
        assert not self._thread.is_alive(), "the server did not end"

    def __enter__(self) -> RunningServer:
        self._thread.start()
        until(lambda: self._server.started)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.begin_to_end()
        self.join()
        self._socket.close()


def until(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not so within {seconds:g} s")
        time.sleep(0.005)
