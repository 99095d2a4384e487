"""faces/server/hosts.py: the names by which the server may be addressed."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import httpx
import pytest

from fake_model import FakeModel
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.app import AppOptions
from ropewalk.faces.server.hosts import host_of, is_loopback
from ropewalk.faces.server.launch import checked_hosts, serve
from ropewalk.text.tokenizer.load import load_tokenizer
from server_runner import RunningServer
from tokenizer_writer import write_sentencepiece


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("tokenizer")))
    return Engine(FakeModel(tokenizer.vocab_size), tokenizer)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[RunningServer]:
    with RunningServer(engine, AppOptions("tiny", allowed_hosts=("my.proxy", "[fd00::1]"))) as running:
        yield running


def status(server: RunningServer, host: str, path: str = "/health") -> int:
    return httpx.get(server.url + path, headers={"Host": host}).status_code


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:80", "localhost.", "a.localhost:1", "127.0.0.1", "127.8.9.1:5", "[::1]:8080", "[::1]"]
    + ["my.proxy", "My.Proxy:443", "[fd00::1]:80"],
)
def test_names_of_this_machine_and_those_allowed_are_answered(server: RunningServer, host: str) -> None:
    assert status(server, host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "not-my.proxy",
        "x.my.proxy",
    ]
    + ["192.168.0.1", "0.0.0.0", "testserver", "[fd00::2]", "my.proxy@evil.example", "127.0.0.1:80:90"],
)
def test_another_name_is_refused_whatever_is_asked_for(server: RunningServer, host: str) -> None:
    for path in ("/health", "/v1/models", "/metrics"):
        response = httpx.get(server.url + path, headers={"Host": host})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (403, "host_not_allowed", "permission_error")
        assert "--allowed-host" in error["message"]


def test_a_request_of_old_without_a_host_is_answered(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b" 200 " in connection.recv(100)


def test_any_name_can_be_allowed(engine: Engine) -> None:
    for options in (AppOptions("tiny"), AppOptions("tiny", allowed_hosts=("*",))):
        with RunningServer(engine, options) as server:
            assert status(server, "evil.example") == 200


def test_a_server_on_loopback_checks_names_and_one_for_others_only_when_told() -> None:
    assert checked_hosts(None, "localhost", "127.0.0.1") == ("localhost", "127.0.0.1")
    assert checked_hosts(("my.proxy",), "localhost", "::1") == ("my.proxy", "localhost", "::1")
    assert checked_hosts(None, "0.0.0.0", "0.0.0.0") is None
    assert checked_hosts(("my.proxy",), "box", "10.0.0.1") == ("my.proxy", "box", "10.0.0.1")


def test_names_and_ports_are_told_apart() -> None:
    names = {"a:1": "a", "a": "a", "[::1]:5": "::1", "[::1]": "::1", "::1": "::1", "a:": "a"}
    assert {text: host_of(text) for text in names} == names
    assert all(map(is_loopback, ("::1", "127.1.2.3", "localhost", "LocalHost.")))
    assert not any(map(is_loopback, ("10.0.0.1", "localhos", "", "127.0.0.1.example")))


def test_a_server_that_says_where_it_is_refuses_nobody_who_comes_at_once(engine: Engine) -> None:
    class Seen(Exception):
        pass

    def come(banner: str) -> None:
        port = int(re.search(r"127\.0\.0\.1:(\d+)", banner)[1])
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
        raise Seen

    with pytest.raises(Seen):
        serve("127.0.0.1", 0, lambda: engine, AppOptions("tiny"), come)
