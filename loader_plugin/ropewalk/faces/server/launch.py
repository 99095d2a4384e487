"""A server from its start to its end: listen, load, say where it is, serve until told to end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import uvicorn

from ropewalk.base.errors import RankError
from ropewalk.base.listening import bound_socket
from ropewalk.base.memory import format_bytes
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.app import AppOptions, create_app
from ropewalk.faces.server.hosts import is_loopback
from ropewalk.faces.server.middleware import access_log
from ropewalk.faces.server.uvicorn_server import GracefulServer

KEEP_ALIVE_S = 30  # for connections without a request


def serve(
    host: str, port: int, make_engine: Callable[[], Engine], options: AppOptions, say: Callable[[str], None]
) -> int:
    """Run the server until it is told to end; returns the exit code. Takes the address before it loads the model.

    options: its adapters are those of the engine; its allowed_hosts become `checked_hosts`. say: shows the lines that
    say where the server is.

    Raises:
        ConfigError: the address is wrong or taken. Also the errors of `make_engine`.
    """
    with bound_socket(host, port) as listener:
        engine = make_engine()
        at, port = listener.getsockname()[:2]
        hosts = checked_hosts(options.allowed_hosts, host, at)
        options = replace(options, adapters=engine.model.adapters, allowed_hosts=hosts)
        app = create_app(engine, options)
        service = app.state.service
        show_requests()
        is_open = not is_loopback(at) and not options.api_keys
        listener.listen()  # whoever reads the URL below and comes at once has to wait a moment, and is not refused
        say(_banner(options, engine, service.names.listed, f"http://{url_host(at)}:{port}/v1", is_open))
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S)
        server, lost = GracefulServer(config, service), threading.Event()

        def stop() -> None:
            lost.set()
            server.should_exit = True  # replies that run end with the error

        engine.model.backend.when_failed(stop)
        server.run(sockets=[listener])
        if lost.is_set():
            raise RankError("the server has ended, because a rank of its pipeline was lost: start it again")
    return 0


def checked_hosts(allowed: Sequence[str] | None, host: str, address: str) -> tuple[str, ...] | None:
    """The names by which a server may be addressed, apart from those of loopback; None: any.

    On loopback, no web page may reach it by a domain name of its own. Elsewhere a server has names that it does not
    know, so they are checked only if some are `allowed`. host, address: what it was told to listen on, and its address.
    """
    if allowed is None and not is_loopback(address):
        return None
    return (*(allowed or ()), host, address)


def url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def show_requests() -> None:
    """One line per request on stderr, without a level in front."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False


def _kept(engine: Engine) -> str:
    """Where prompts are kept, and how many there are."""
    folder = engine.kept.folder
    if folder is None:
        return ""
    count, used = len(folder.list()), format_bytes(folder.used_bytes)
    return f"{count} prompts, {used} of {format_bytes(folder.most_bytes)}, in {folder.folder}"


def _banner(options: AppOptions, engine: Engine, names: list[str], url: str, is_open: bool) -> str:
    model, queue = engine.model, engine.queue
    lines = {
        "URL": url,
        "model": names[0],
        "adapters": ", ".join(names[1:]),
        "context": f"{engine.context_size} tokens",
        "replies": f"{queue.num_turns} at once; {queue.limit} requests may wait",
        "cache": f"up to {format_bytes(model.cache_memory)}",
        "kept": _kept(engine),
        "guessing": engine.speculation or "",
        "API key": "needed" if options.api_keys else "none",
        "web pages": ", ".join(options.cors_origins),
    }
    rows = [f"  {name:<9} {value}" for name, value in lines.items() if value]
    if is_open:
        rows.append("  warning: anyone who reaches this address can use the model: give --api-key KEY")
    return "\n".join(["", "ropewalk serve", *rows, "  Ctrl-C ends it after the running replies (twice: at once)", ""])
