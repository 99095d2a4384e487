"""Sockets to listen on: for the server and the page, before they load a model."""

from __future__ import annotations

import socket

from ropewalk.base.errors import ConfigError

MAX_PORT = 65535


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet. port 0: any free one.

    Raises:
        ConfigError: there is no such host or port, or the port is taken.
    """
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"--port must be from 0 to {MAX_PORT}, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host such as "a..b"
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {reason}") from error
    return bound
