"""Replicas under Ray on a cluster of several nodes, beside a server alone: the same replies, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="needs Ray: pip install 'ropewalk[cluster]'")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Ray's clusters of several nodes need Linux")

from ropewalk.faces.cli.serve import app_options, make_engine  # noqa: E402
from running_cluster import RunningCluster, running_cluster  # noqa: E402
from server_runner import RunningServer, until  # noqa: E402

PATIENCE_S = 120.0
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": "def main():\n    ", "max_tokens": 600, "ignore_eos": True, "temperature": 0.8}
SYSTEM = "You write functions in Python, with short names, and you never explain what they do. " * 6
# The engine writes them one token a step; the tests that stop it in the middle want a reply that takes a second or two.


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    with running_cluster(num_nodes=2, num_replicas=2) as running:
        yield running


@pytest.fixture(scope="module")
def alone() -> Iterator[RunningServer]:
    from ropewalk.cluster.command import parsed

    args = parsed(["--threads", "1"])
    engine = make_engine(args)
    with RunningServer(engine, replace(app_options(args), adapters=engine.model.adapters)) as server:
        yield server


def ask(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A whole reply, without what differs from one reply to the next: its id, its time, and what was in the cache."""
    answer = httpx.post(url + path, json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    del found["id"], found["created"], found["usage"]["prompt_tokens_details"]
    return found


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a stream, which must come to its end."""
    last = ""
    for line in answer.iter_lines():
        last = line or last
        if line.startswith("data: {"):
            yield json.loads(line[len("data: ") :])
    assert last == "data: [DONE]"


REQUESTS = {
    "greedy": (TEXT, {"prompt": "def add(a, b):", "max_tokens": 24, "temperature": 0}),
    "sampled": (TEXT, {"prompt": "import os\n", "max_tokens": 24, "temperature": 1, "seed": 5, "n": 2}),
    "log probabilities": (
        TEXT,
        {"prompt": "x = [1, 2", "max_tokens": 8, "temperature": 0, "logprobs": 2, "echo": True},
    ),
    "token ids": (TEXT, {"prompt": [300, 301, 302], "max_tokens": 8, "temperature": 0}),
    "chat": (CHAT, {"messages": [{"role": "user", "content": "def f(x):"}], "max_tokens": 16, "temperature": 0}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_replies_are_those_of_a_server_alone(cluster: RunningCluster, alone: RunningServer, name: str) -> None:
    path, body = REQUESTS[name]
    expected = ask(alone.url, path, body)
    assert all(ask(cluster.url, path, body) == expected for _ in range(3))


def test_errors_are_those_of_a_server_alone(cluster: RunningCluster, alone: RunningServer) -> None:
    for path, body in ((TEXT, {"prompt": 5}), (TEXT, {"prompt": "x", "model": "another"}), ("/v1/nothing", {})):
        here, there = (httpx.post(url + path, json=body, timeout=PATIENCE_S) for url in (alone.url, cluster.url))
        assert (here.status_code, here.json()) == (there.status_code, there.json())
        assert here.status_code in (400, 404)


def test_32_clients_at_once_lose_nothing(cluster: RunningCluster, alone: RunningServer) -> None:
    bodies = [{"prompt": f"def f{n}(", "max_tokens": 12, "temperature": 0, "ignore_eos": True} for n in range(32)]
    with ThreadPoolExecutor(32) as clients:
        expected = list(clients.map(lambda body: ask(alone.url, TEXT, body), bodies))
        assert list(clients.map(lambda body: ask(cluster.url, TEXT, body), bodies)) == expected
    replies = [value for name, value in cluster.metrics().items() if name.startswith("ropewalk_request_seconds_count{")]
    assert len(replies) == 2 and all(replies), "each replica has had some, and its own metrics say so"


def test_a_conversation_stays_where_its_pages_are(cluster: RunningCluster) -> None:
    messages = [{"role": "system", "content": SYSTEM}]
    for turn in range(4):
        messages.append({"role": "user", "content": f"And now function {turn}:"})
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(cluster.url + CHAT, json=body, timeout=PATIENCE_S).json()
        details, prompt = answer["usage"]["prompt_tokens_details"], answer["usage"]["prompt_tokens"]
        assert turn == 0 or details["cached_tokens"] > 0.6 * prompt
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})


def test_a_client_that_leaves_ends_its_reply(cluster: RunningCluster) -> None:
    body = LONG | {"max_tokens": 1500, "stream": True}
    with httpx.stream("POST", cluster.url + TEXT, json=body, timeout=PATIENCE_S) as answer:
        chunks = events(answer)
        next(chunks)
        assert sum(state.running for state in cluster.states()) == 1
    until(lambda: not any(state.running for state in cluster.states()), 5)
    metrics = cluster.metrics()
    left = [value for name, value in metrics.items() if name.startswith("ropewalk_disconnects_total{")]
    assert sum(left) == metrics["ropewalk_front_disconnects_total"] == 1


def test_a_replica_that_is_killed_costs_no_reply(cluster: RunningCluster, alone: RunningServer) -> None:
    """A stream without a seed goes on, and is what its seed gives; so is a whole reply that the replica was writing."""
    expected = ask(alone.url, TEXT, LONG | {"temperature": 0})["choices"][0]["text"]
    whole: list[str] = []

    def ask_for_whole() -> None:
        whole.append(ask(cluster.url, TEXT, LONG | {"temperature": 0})["choices"][0]["text"])

    before = cluster.metrics()["ropewalk_front_resumed_total"]
    asking = threading.Thread(target=ask_for_whole)
    body = LONG | {"temperature": 0, "stream": True}
    with httpx.stream("POST", cluster.url + TEXT, json=body, timeout=PATIENCE_S) as answer:
        chunks = events(answer)
        got = [next(chunks) for _ in range(5)]
        asking.start()  # a prompt that begins like the stream's: the same replica
        victim = next(state for state in cluster.states() if state.running)
        os.kill(victim.process, signal.SIGKILL)
        got += list(chunks)
    asking.join(PATIENCE_S)
    assert "".join(chunk["choices"][0]["text"] for chunk in got) == expected
    assert len({(chunk["id"], chunk["created"]) for chunk in got}) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in got if chunk["choices"][0]["finish_reason"]] == ["length"]
    assert whole == [expected]
    assert cluster.metrics()["ropewalk_front_resumed_total"] == before + 1


def test_an_update_replaces_all_and_uses_a_machine_that_joins(cluster: RunningCluster, alone: RunningServer) -> None:
    """With other options, new replicas come one after the other; a stream that runs meanwhile is not cut off. The new
    ones have another server in front, a deployment too, as `serve run ropewalk.cluster:app` has it."""
    body = LONG | {"temperature": 0, "stream": True}
    with httpx.stream("POST", cluster.url + TEXT, json=body, timeout=PATIENCE_S) as answer:
        chunks = events(answer)
        next(chunks)
        cluster.add_node()
        updating = threading.Thread(target=cluster.deploy_with_front, args=(3, {"max_running": 4}))
        updating.start()
        assert sum(bool(chunk["choices"][0]["finish_reason"]) for chunk in chunks) == 1
    updating.join(PATIENCE_S)
    busy = {"running": 0, "max_running": 3 * 4, "waiting": 0}
    for url in (cluster.url, cluster.deployed_url):
        until(lambda url=url: cluster.health(url) == {"status": "ok", "replicas": 3, **busy})
    path, body = REQUESTS["greedy"]
    expected = ask(alone.url, path, body)["choices"][0]["text"]
    assert httpx.post(cluster.deployed_url + path, json=body, timeout=PATIENCE_S).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    with httpx.stream(
        "POST", cluster.deployed_url + path, json=body | {"stream": True}, headers=headers, timeout=PATIENCE_S
    ) as answer:
        assert "".join(chunk["choices"][0]["text"] for chunk in events(answer)) == expected
