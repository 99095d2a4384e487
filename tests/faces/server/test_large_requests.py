"""Requests that are far too large, many at once: each is refused soon, and nobody else has to wait."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from fixtures import REPOSITORY
from ropewalk.faces.server.bodies import count_values

sys.path.insert(0, str(REPOSITORY / "scripts" / "press"))
from server_process import ServerProcess  # noqa: E402

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
TEN_MB = "def f(x): return x\n" * 526_316
PATIENCE_S = 120.0
HEALTH_S = 5.0  # far above what it takes (0.1 s), far below what one 10 MB prompt took once (24 s); machines are busy
MEMORY_BYTES = 400 * 2**20  # eight bodies of 10 MB and two of them parsed; tokenising one took 800 MB


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(["--threads", "1", "--max-new-tokens", "4"]) as running:
        httpx.post(running.url + COMPLETE, json={"prompt": "warm"}, timeout=PATIENCE_S)
        yield running


def post(server: ServerProcess, path: str, body: object) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=PATIENCE_S)


def code(response: httpx.Response) -> str:
    return response.json()["error"]["code"]


class Watch:
    """The longest answer of /health, and the most memory, while in a `with` block."""

    def __init__(self, server: ServerProcess) -> None:
        self._server, self._over = server, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.longest_s, self.num_answers, self.most_bytes = 0.0, 0, 0

    def _look(self) -> None:
        with httpx.Client(timeout=PATIENCE_S) as client:
            while not self._over.wait(0.02):
                started = time.monotonic()
                assert client.get(self._server.url + "/health").status_code == 200
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                self.num_answers += 1
                self.most_bytes = max(self.most_bytes, self._server.resident_bytes())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._over.set()
        self._thread.join()


def test_health_answers_beside_prompts_that_are_too_long_and_prompts_that_just_fit(server: ServerProcess) -> None:
    # Four times 10 MB in each kind of request, and four that fill the context but for a few tokens.
    talk = {"messages": [{"role": "user", "content": TEN_MB}]}
    bodies = [(COMPLETE, {"prompt": TEN_MB}), (CHAT, talk), (COMPLETE, {"prompt": ["x", TEN_MB]})] * 3
    fitting = [(COMPLETE, {"prompt": f"{number} " + TEN_MB[:3200], "max_tokens": 2}) for number in range(3)]
    before = server.resident_bytes()
    with Watch(server) as watch, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda each: post(server, *each), [*bodies, *fitting]))
    grown = watch.most_bytes - before
    print(f"health {watch.longest_s:.2f} s at most ({watch.num_answers}), {grown / 2**20:.0f} MiB more")
    for (path, _), answer in zip(bodies, answers[: len(bodies)], strict=True):
        if path == CHAT:  # the model's own template has a limit, which is reached before anything becomes tokens
            assert answer.status_code == 400 and "it writes more than" in answer.json()["error"]["message"]
        else:
            assert code(answer) == "context_length_exceeded"
    assert [answer.status_code for answer in answers[len(bodies) :]] == [200] * len(fitting)
    assert watch.num_answers >= 3 and watch.longest_s < HEALTH_S
    assert grown < MEMORY_BYTES


def test_lists_objects_and_depth_without_end_are_refused_as_soon(server: ServerProcess) -> None:
    million = 2_000_000
    contents = {
        "ids": (b'{"prompt":[' + b"5," * million + b"5]}", "too_many_values"),
        "ids of one prompt of many": (b'{"prompt":[[5],[' + b"5," * 100_000 + b"5]]}", "context_length_exceeded"),
        "lists": (b'{"prompt":[' + b"[]," * million + b"[]]}", "too_many_values"),
        "texts": (b'{"prompt":[' + b'"",' * million + b'""]}', "too_many_values"),
        "objects": (b'{"x":[' + b"{}," * million + b"{}]}", "too_many_values"),
        "wrong ids": (b'{"prompt":[' + b"-5," * 100_000 + b"5]}", None),
        "messages": (b'{"messages":[' + b"{}," * 100_000 + b"{}]}", None),
        "escapes": (b'{"prompt":"' + b'\\\\\\"' * million + b'"}', "context_length_exceeded"),
        "depth": (b'{"prompt":' + b"[" * 200_000 + b"]" * 200_000 + b"}", None),
        "deep objects": (b'{"prompt":"x","y":' + b'{"z":' * 50_000 + b"1" + b"}" * 50_000 + b"}", None),
        "digits": (b'{"prompt":"x","seed":' + b"7" * million + b"}", None),
        "key": (b'{"' + b"k" * 8 * million + b'":1}', None),
    }
    headers = {"Content-Type": "application/json"}

    def send(name: str) -> tuple[str, httpx.Response]:
        content, _ = contents[name]
        path = CHAT if name == "messages" else COMPLETE
        pieces = (content[at : at + 65536] for at in range(0, len(content), 65536))  # no Content-Length
        return name, httpx.post(server.url + path, content=pieces, headers=headers, timeout=PATIENCE_S)

    with Watch(server) as watch, ThreadPoolExecutor(4) as pool:
        answers = dict(pool.map(send, contents))
    print(f"health {watch.longest_s:.2f} s at most ({watch.num_answers}), {watch.most_bytes / 2**20:.0f} MiB")
    for name, (_, expected) in contents.items():
        assert answers[name].status_code in (400, 413), name
        assert expected in (None, code(answers[name])), name
        assert len(answers[name].text) < 2000, name
    assert watch.longest_s < HEALTH_S


def test_a_body_beyond_the_limit_is_refused_by_its_declared_length(server: ServerProcess) -> None:
    with httpx.Client(timeout=PATIENCE_S) as client:
        request = client.build_request("POST", server.url + COMPLETE, content=b"x" * (17 * 2**20))
        response = client.send(request)
    assert (response.status_code, code(response)) == (413, "body_too_large")


@pytest.mark.parametrize(
    "value",
    [{}, [], [1, 2, 3], {"a": [1, {"b": ["x,[{", '"', "\\", '\\"']}]}, "x,y", [[[]]], ["\\\\", "\\\\\\"], {"k\\": 1}],
)
def test_values_are_counted_outside_of_texts_only(value: object) -> None:
    def count(part: object) -> int:
        parts = list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else []
        return 1 + sum(map(count, parts))

    found = count_values(json.dumps(value).encode(), 1000)
    num_lists = json.dumps(value).count("[") + json.dumps(value).count("{")
    assert count(value) <= found <= count(value) + num_lists


def test_counting_stops_where_there_are_enough_texts() -> None:
    assert count_values(b'["",' + b'"",' * 1000 + b'""]', 100) > 100
