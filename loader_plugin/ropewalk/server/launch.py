"""What `ropewalk serve` does: listen, load, say where it is, serve until told to end."""

from __future__ import annotations

import argparse
import logging
import socket
from typing import Any

import uvicorn

from ropewalk.cli_options import chosen_template, load, load_adapters, model_folder, note, sampling_params
from ropewalk.engine import Engine
from ropewalk.errors import ConfigError, RequestError
from ropewalk.memory import available_bytes, format_bytes
from ropewalk.server.app import AppOptions, create_app
from ropewalk.server.middleware import access_log
from ropewalk.server.uvicorn_server import GracefulServer

MOST_CACHES = 4  # taken where memory allows: enough for a few people, or for one with several tools
LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_PORT = 65535
KEEP_ALIVE_S = 30  # for connections without a request


def serve(args: argparse.Namespace) -> int:
    """Run the server; the exit code.

    Raises:
        RequestError, ConfigError: an option is wrong, or the address is taken. Others as `load_model`.
    """
    keys, defaults = _api_keys(args), sampling_params(args)
    with _listen(args.host, args.port) as listener:
        engine = _engine(args)
        name = args.name or model_folder(args).resolve().name
        app = create_app(engine, AppOptions(name, engine.model.adapters, defaults, keys, args.cors_origin))
        service = app.state.service
        _show_requests()
        host, port = listener.getsockname()[:2]
        note(_banner(args, engine, service.names.listed, f"http://{_url_host(host)}:{port}/v1", bool(keys)))
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S)
        GracefulServer(config, service).run(sockets=[listener])
    return 0


def _engine(args: argparse.Namespace) -> Engine:
    if args.queue_limit < 0:
        raise RequestError(f"--queue-limit must be at least 0, got {args.queue_limit}")
    model, tokenizer = load(args)
    used = load_adapters(args, model)
    if any(weight != 1.0 or instances is not None for _, weight, instances in used):
        raise RequestError("--adapter: serve takes folders alone; clients give weight and instances in a model's name")
    num_caches = _num_caches(model) if args.caches is None else args.caches
    return Engine(model, tokenizer, chosen_template(args, tokenizer), num_caches, args.queue_limit)


def _num_caches(model: Any) -> int:
    """As many as fit into half of the memory that is free now, up to `MOST_CACHES`."""
    free = available_bytes()
    fitting = MOST_CACHES if free is None else free // 2 // model.cache_bytes(model.max_seq_len)
    return max(1, min(MOST_CACHES, fitting))


def _api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = list(args.api_key)
    if args.api_key_file is not None:
        try:
            keys += args.api_key_file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--api-key-file {args.api_key_file} cannot be read: {error}") from error
        if not keys:
            raise RequestError(f"--api-key-file {args.api_key_file} holds no key: write one per line")
    if not all(key and key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise RequestError("--api-key: a key must be printable ASCII without spaces, and not empty")
    return tuple(keys)


def _listen(host: str, port: int) -> socket.socket:
    """The socket, before the model is loaded: a port that is taken is told at once."""
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"--port must be from 0 to {MAX_PORT}, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error.strerror or error}") from error
    return listener


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _show_requests() -> None:
    """One line per request on stderr, without a level in front."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False


def _banner(args: argparse.Namespace, engine: Engine, names: list[str], url: str, has_keys: bool) -> str:
    model, queue = engine.model, engine.queue
    memory = format_bytes(queue.num_turns * model.cache_bytes(engine.context_size))
    lines = {
        "URL": url,
        "model": names[0],
        "adapters": ", ".join(names[1:]),
        "context": f"{engine.context_size} tokens",
        "caches": f"{queue.num_turns} (at most {memory}); {queue.limit} requests may wait",
        "API key": "needed" if has_keys else "none",
        "web pages": ", ".join(args.cors_origin),
    }
    rows = [f"  {name:<9} {value}" for name, value in lines.items() if value]
    if args.host not in LOCAL and not has_keys:
        rows.append("  warning: anyone who reaches this address can use the model: give --api-key KEY")
    return "\n".join(["", "ropewalk serve", *rows, "  Ctrl-C ends it after the replies that run (twice: at once)", ""])
