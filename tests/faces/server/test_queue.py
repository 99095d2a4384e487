"""Who waits, who is sent away, and how soon a client that leaves frees its place. The model is as slow as needed."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from fake_model import FakeModel
from ropewalk.engine.engine import Engine
from ropewalk.faces.server import answers, uvicorn_server
from ropewalk.faces.server.app import AppOptions
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer
from server_runner import RunningServer, until
from tokenizer_writer import write_sentencepiece

COMPLETE = "/v1/completions"
REST = {"ignore_eos": True, "temperature": 0}


class GatedModel(FakeModel):
    """Computes nothing while the gate is closed. step_s: how long a token takes otherwise."""

    step_s = 0.0

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, capacity=512)
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, token_ids, cache, logits="last", progress=None, cancelled=None, seq_len=None, adapters=None):
        while not self.gate.wait(0.005):
            if cancelled is not None and cancelled():
                return None
        time.sleep(self.step_s)
        return super().forward(token_ids, cache, logits, progress, cancelled, seq_len, adapters)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def model(tokenizer: Tokenizer) -> Iterator[GatedModel]:
    model = GatedModel(tokenizer.vocab_size)
    yield model
    model.gate.set()


@pytest.fixture
def server(model: GatedModel, tokenizer: Tokenizer) -> Iterator[RunningServer]:
    engine = Engine(model, tokenizer, max_running=1, queue_limit=2)
    with RunningServer(engine, AppOptions("tiny")) as running:
        yield running
        model.gate.set()


@contextmanager
def in_background(*calls) -> Iterator[list]:
    """Futures of the calls, each in a thread."""
    with ThreadPoolExecutor(len(calls)) as pool:
        yield [pool.submit(call) for call in calls]


def complete(server: RunningServer, **settings) -> httpx.Response:
    return server.post(COMPLETE, {"prompt": "rope", "max_tokens": 4} | REST | settings)


def begun(model: GatedModel, prompts: dict[str, list[int]]) -> list[str]:
    """Whose prompts were read, in order; replies may arrive in another. A repeated one computes its last token."""
    return [name for ids in model.calls for name, prompt in prompts.items() if ids in (prompt, prompt[-1:])]


def busy(server: RunningServer) -> tuple[int, int]:
    queue = server.service.engine.queue
    return queue.num_running, queue.num_waiting


def test_past_the_limit_a_request_gets_429_and_when_to_come_again(server: RunningServer, model: GatedModel) -> None:
    model.gate.clear()
    with in_background(*[lambda: complete(server)] * 3) as running:
        until(lambda: busy(server) == (1, 2))
        refused = complete(server)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        error = refused.json()["error"]
        assert error["code"] == "queue_full" and "1 running and 2 waiting, which is the limit" in error["message"]
        with pytest.raises(openai.RateLimitError):
            server.client.completions.create(model="tiny", prompt="x")
        health = server.get("/health").json()
        assert (health["running"], health["waiting"], health["queue_limit"]) == (1, 2, 2)
        model.gate.set()
        assert [one.result().status_code for one in running] == [200] * 3
    until(lambda: busy(server) == (0, 0))
    assert complete(server).status_code == 200


def test_requests_are_computed_in_the_order_of_arrival(server: RunningServer, model: GatedModel) -> None:
    prompts = [[10 + number] * 3 for number in range(3)]
    model.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        for number, prompt in enumerate(prompts):
            pool.submit(complete, server, prompt=prompt)
            until(lambda number=number: sum(busy(server)) == number + 1)
        model.gate.set()
    assert [call for call in model.calls if len(call) == 3] == prompts  # the others are single tokens of replies


def test_a_stream_that_waits_tells_its_position(server: RunningServer, model: GatedModel, monkeypatch) -> None:
    monkeypatch.setattr(answers, "KEEP_ALIVE_S", 0.02)
    model.gate.clear()
    with in_background(lambda: complete(server)):
        until(lambda: busy(server) == (1, 0))
        body = {"prompt": "rope", "max_tokens": 2, "stream": True} | REST
        with httpx.stream("POST", server.url + COMPLETE, json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            assert next(lines) == ": waiting at position 1 of the queue"
            model.gate.set()
            rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert [json.loads(x[6:])["choices"][0]["text"] for x in rest if x.startswith("data: {")][-1] == ""


def open_and_leave(server: RunningServer, body: dict) -> socket.socket:
    """Send a request and keep the connection, to be closed by the caller."""
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    content = json.dumps({"prompt": "rope", "max_tokens": 400} | REST | body).encode()
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read_frees_its_turn(server, model, streams: bool) -> None:
    gone = server.metric("ropewalk_disconnects_total")
    model.gate.clear()
    connection = open_and_leave(server, {"stream": streams})
    until(lambda: busy(server) == (1, 0))
    connection.close()
    until(lambda: busy(server) == (0, 0))
    until(lambda: server.metric("ropewalk_disconnects_total") == gone + 1)
    model.gate.set()
    assert complete(server).status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_the_queue_frees_its_place(server, model, streams: bool) -> None:
    model.gate.clear()
    with in_background(lambda: complete(server)) as running:
        until(lambda: busy(server) == (1, 0))
        connection = open_and_leave(server, {"stream": streams})
        until(lambda: busy(server) == (1, 1))
        connection.close()
        until(lambda: busy(server) == (1, 0))
        model.gate.set()
        assert running[0].result().status_code == 200
    assert not server.service.jobs.live


def test_a_client_that_leaves_within_a_stream_frees_its_turn(server, model: GatedModel) -> None:
    model.step_s = 0.01
    stream = server.client.completions.create(
        model="tiny", prompt="rope", max_tokens=400, stream=True, temperature=0, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    until(lambda: busy(server) == (0, 0), 5)
    assert len(model.calls) < 400
    assert complete(server).status_code == 200


def test_a_reply_after_a_client_that_left_is_not_touched_by_it(server, tokenizer: Tokenizer, model: GatedModel) -> None:
    alone = Engine(FakeModel(tokenizer.vocab_size, capacity=512), tokenizer)
    expected = alone.generate("rope walk", SamplingParams(seed=1, max_new_tokens=20, ignore_eos=True)).text
    for number in range(10):
        connection = open_and_leave(server, {"stream": bool(number % 2), "prompt": "rope walk"})
        until(lambda: sum(busy(server)) > 0)
        connection.close()
        done = server.post(COMPLETE, {"prompt": "rope walk", "max_tokens": 20, "seed": 1, "ignore_eos": True})
        assert done.json()["choices"][0]["text"] == expected


def test_a_graceful_end_finishes_the_reply_that_runs_and_refuses_those_that_wait(tokenizer: Tokenizer) -> None:
    model = GatedModel(tokenizer.vocab_size)
    server = RunningServer(Engine(model, tokenizer, max_running=1), AppOptions("tiny"))
    with server:
        model.gate.clear()
        with in_background(lambda: complete(server), lambda: complete(server, stream=True)) as both:
            until(lambda: busy(server) == (1, 1))
            server.begin_to_end()
            until(lambda: server.service.draining)
            time.sleep(0.05)
            model.gate.set()
            answers_ = [one.result() for one in both]
        server.join()
    whole = next(a for a in answers_ if a.headers["content-type"].startswith("application/json"))
    streamed = next(a for a in answers_ if a is not whole)
    finished = whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] == 4
    refused = "shutting_down" in (whole.text if whole.status_code == 503 else streamed.text)
    assert refused
    assert finished or '"finish_reason":"length"' in streamed.text
    with pytest.raises(httpx.ConnectError):
        server.get("/health")


def test_a_second_signal_of_either_kind_cuts_replies_off(tokenizer: Tokenizer) -> None:
    model = GatedModel(tokenizer.vocab_size)
    server = RunningServer(Engine(model, tokenizer, max_running=1), AppOptions("tiny"))
    with server:
        model.gate.clear()
        with in_background(lambda: complete(server, stream=True)) as running:
            until(lambda: busy(server) == (1, 0))
            server.signal(signal.SIGTERM)
            until(lambda: server.service.draining)
            server.signal(signal.SIGTERM)
            server.join()
            assert running[0].exception() is not None or "shutting_down" in running[0].result().text


def test_a_client_that_stalls_does_not_keep_the_server_from_ending(tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(uvicorn_server, "PATIENCE_S", 0.2)
    server = RunningServer(Engine(GatedModel(tokenizer.vocab_size), tokenizer), AppOptions("tiny"))
    with server, socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000"
        connection.sendall(head.encode() + b"\r\n\r\n{")
        assert complete(server).status_code == 200  # the other one has arrived, too
        server.begin_to_end()
        server.join()


def test_many_clients_of_two_caches_get_what_they_get_alone(tokenizer: Tokenizer) -> None:
    model = FakeModel(tokenizer.vocab_size, capacity=256)
    alone = Engine(FakeModel(tokenizer.vocab_size, capacity=256), tokenizer)
    engine = Engine(model, tokenizer, max_running=2, queue_limit=64)

    def ask(number: int) -> str:
        body = {"prompt": f"rope {number % 5}", "max_tokens": 20, "seed": number, "ignore_eos": True}
        return server.post(COMPLETE, body).json()["choices"][0]["text"]

    with RunningServer(engine, AppOptions("tiny")) as server, ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(36)))
    assert texts == [
        alone.generate(f"rope {n % 5}", SamplingParams(seed=n, max_new_tokens=20, ignore_eos=True)).text
        for n in range(36)
    ]


@pytest.mark.parametrize("field", [{"priority": "batch"}, {"priority": 5}, {"service_tier": "flex"}])
def test_a_request_that_can_wait_goes_after_those_that_cannot(server, model: GatedModel, field: dict) -> None:
    requests = {"first": {}, "batch": field, "interactive": {"priority": -1}}
    prompts = {name: [5 + 4 * n + i for i in range(4)] for n, name in enumerate(requests)}
    model.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        for number, (name, fields) in enumerate(requests.items()):
            pool.submit(complete, server, prompt=prompts[name], **fields)
            until(lambda number=number: sum(busy(server)) == number + 1)
        model.gate.set()
    assert begun(model, prompts) == ["first", "interactive", "batch"]


def test_clients_take_turns_by_their_keys(tokenizer: Tokenizer, model: GatedModel) -> None:
    engine = Engine(model, tokenizer, max_running=1, queue_limit=9)
    prompts = {"a": [5, 6, 7, 8], "b": [9, 10, 11, 12]}

    def ask(key: str) -> None:
        body = {"prompt": prompts[key], "max_tokens": 2, **REST}
        httpx.post(server.url + COMPLETE, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    with RunningServer(engine, AppOptions("tiny", api_keys=["a", "b"])) as server, ThreadPoolExecutor(6) as pool:
        model.gate.clear()
        for number, key in enumerate("aaaab"):
            pool.submit(ask, key)
            until(lambda number=number: busy(server)[0] + busy(server)[1] == number + 1)
        model.gate.set()
    assert begun(model, prompts) == list("abaaa")


def test_metrics_tell_of_steps_pages_and_guesses(tokenizer: Tokenizer) -> None:
    model = FakeModel(tokenizer.vocab_size, capacity=256, script=lambda history: 40 + len(history) % 3)
    engine = Engine(model, tokenizer, speculation="ngram")
    with RunningServer(engine, AppOptions("tiny")) as server:
        done = server.post(COMPLETE, {"prompt": "rope", "max_tokens": 200, **REST}).json()
        text = server.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("ropewalk_"))
    assert float(values["ropewalk_steps"]) > 0 and float(values["ropewalk_rows"]) >= 200
    assert float(values["ropewalk_preempted"]) == 0
    assert float(values["ropewalk_cache_used_bytes"]) == float(values["ropewalk_cache_shared_bytes"]) > 0
    details = done["usage"].get("completion_tokens_details", {"accepted_prediction_tokens": 0})
    assert float(values['ropewalk_tokens_total{kind="accepted"}']) == details["accepted_prediction_tokens"]
    assert float(values['ropewalk_tokens_total{kind="guessed"}']) >= details["accepted_prediction_tokens"]
