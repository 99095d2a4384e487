"""Everything that goes wrong is reported in OpenAI's shape, and the official client raises what it should."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from fake_model import FakeModel
from ropewalk.base.errors import CheckpointError
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.app import AppOptions
from ropewalk.text.tokenizer.load import load_tokenizer
from server_runner import RunningServer
from tokenizer_writer import write_sentencepiece

TALK = [{"role": "user", "content": "hi"}]
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("tokenizer")))
    return Engine(FakeModel(tokenizer.vocab_size, capacity=512), tokenizer, "vicuna")


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[RunningServer]:
    with RunningServer(engine, AppOptions("tiny")) as running:
        yield running


def error_of(response: httpx.Response, status: int) -> dict:
    """The error of a response; asserts that it has the shape and nothing else."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "Field required"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": ""}, None, None),
        ({"prompt": "x", "temperature": "0.5"}, "temperature", "valid number"),
        ({"prompt": "x", "temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"prompt": "x", "n": 17}, "n", "less than or equal to 16"),
        ({"prompt": "x", "n": True}, "n", "valid integer"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"prompt": "x", "stop": [""]}, "stop", "at least 1 character"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "'a' is not a token id: the model knows 0 to"),
        ({"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias", "'99999' is not a token id"),
        ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"prompt": [10**6]}, "prompt", "token id 1000000 at position 0 is out of range"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "suffix is not supported: text is continued at its end only"),
        ({"prompt": "x", "best_of": 3}, "best_of", "best_of is not supported: all replies are returned"),
        ({"prompt": "x", "grammar": "root ::= x"}, "grammar", "replies are not constrained"),
        ({"prompt": "\ud800"}, "prompt", "an unpaired surrogate"),
        ({"prompt": "x", "context_shift": "yes"}, "context_shift", "valid boolean"),
        ({"prompt": "x", "stop_token_ids": [5, 99999]}, "stop_token_ids", "99999 is not a token id"),
        ({"prompt": "x", "best_of": 3, "n": 2}, "best_of", "best_of is not supported"),
        ({"prompt": "x", "\ud83d": 1}, None, "the name of a field is not a text"),
    ],
)
def test_wrong_completions_are_refused_by_the_name_of_the_field(server: RunningServer, body, param, message) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(server.url + COMPLETE, content=json.dumps(body), headers=headers)
    if message is None:  # an empty prompt is the bos token here, which is a prompt
        assert response.status_code == 200
        return
    error = error_of(response, 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role", "Field required"),
        ({"messages": [{"role": "user"}]}, "messages", "message 1 (role 'user') has no content"),
        ({"messages": [*TALK, {"role": "tool", "content": "x"}]}, "messages", "message 2 has the role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "this model reads text only, and messages.0.content holds 'image_url': leave it out",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not constrained to a format"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools, which are passed to the chat template"),
        ({"tool_choice": "required"}, "tool_choice", 'use "auto" or "none"'),
        ({"modalities": ["text", "audio"]}, "modalities", "replies are text"),
        ({"web_search_options": {}}, "web_search_options", "no web search"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages cannot be set here"),
    ],
)
def test_wrong_chats_are_refused_by_the_name_of_the_field(server: RunningServer, change, param, message) -> None:
    error = error_of(server.post(CHAT, {"messages": TALK} | change), 400)
    assert str(error["param"]).startswith(str(param))
    assert message in error["message"]


def test_fields_that_ask_for_nothing_special_are_accepted(server: RunningServer) -> None:
    harmless = {
        "model": None,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "store": False,
        "metadata": {"a": "b"},
        "user": "me",
        "service_tier": "auto",
        "n": None,
        "stop": None,
        "unheard_of": 1,
    }
    assert server.post(CHAT, {"messages": TALK, "max_tokens": 2} | harmless).status_code == 200
    assert server.post(COMPLETE, {"prompt": "x", "max_tokens": 2, "best_of": 1, "suffix": ""}).status_code == 200
    assert server.post(COMPLETE, {"prompt": "x", "max_tokens": 2, "best_of": 2, "n": 2}).status_code == 200


def test_a_refusal_among_the_parts_of_a_message_is_text(server: RunningServer) -> None:
    answer = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert server.post(CHAT, {"messages": [*TALK, answer, *TALK], "max_tokens": 2}).status_code == 200
    answer["content"][0].pop("refusal")
    error = error_of(server.post(CHAT, {"messages": [*TALK, answer, *TALK]}), 400)
    assert error["message"] == "messages.1.content: a part of type refusal needs its refusal"


def test_what_cannot_be_done_is_refused_before_a_stream_begins(server: RunningServer, engine: Engine) -> None:
    banned = {str(number): -100 for number in range(engine.model.config.vocab_size)}
    response = server.post(COMPLETE, {"prompt": "x", "stream": True, "logit_bias": banned})
    assert error_of(response, 400)["param"] == "logit_bias"


def test_head_is_answered_where_get_is(server: RunningServer) -> None:
    for path in ("/health", "/metrics", "/v1/models", "/v1/models/tiny"):
        response = httpx.head(server.url + path)
        assert (response.status_code, response.content) == (200, b""), path
    assert all("head" not in methods for methods in server.get("/openapi.json").json()["paths"].values())


def test_a_stream_says_once_what_becomes_of_the_connection(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 2, "stream": True}
    response = httpx.post(server.url + COMPLETE, json=body, headers={"Connection": "close"})
    assert response.headers.get_list("connection") == ["close"]


def test_the_official_client_raises_its_own_errors(server: RunningServer) -> None:
    client = server.client
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="x " * 600)
    assert bad.value.code == "context_length_exceeded" and "more than the context of 512" in bad.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=TALK)
    assert missing.value.code == "model_not_found" and "available are tiny" in missing.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.BadRequestError, match="this server has no embeddings") as embeddings:
        client.embeddings.create(model="tiny", input="x")
    assert embeddings.value.code == "unsupported_endpoint"


def test_unknown_paths_and_methods_are_told_in_the_same_shape(server: RunningServer) -> None:
    missing = error_of(server.get("/v1/images"), 404)
    assert missing["message"] == "there is no GET /v1/images here"
    response = server.get(COMPLETE)
    assert "does not take GET, but POST" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body is not valid JSON"),
        (b"", ""),
        (b"[]", "a JSON object"),
        (b'"x"', "a JSON object"),
        (b"\xff\xfe{}", ""),
        (b"[" * 100_000, ""),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "seed": 1e400}', "seed"),
        (b'{"prompt": "x", "seed": 99999999999999999999}', "seed"),
        (b'{"model": "\\ud800", "prompt": "x"}', "there is no model"),
    ],
)
def test_bodies_that_are_no_request_are_refused(server: RunningServer, content: bytes, message: str) -> None:
    response = httpx.post(server.url + COMPLETE, content=content, headers={"Content-Type": "application/json"})
    assert message in error_of(response, response.status_code)["message"]
    assert 400 <= response.status_code < 500


def test_a_body_that_is_not_declared_as_json_is_told_what_to_add(server: RunningServer) -> None:
    response = httpx.post(server.url + COMPLETE, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in error_of(response, 400)["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused_with_or_without_its_length(engine: Engine, declared: bool) -> None:
    content = b"x" * 2000 if declared else iter([b"x" * 600] * 3)
    with RunningServer(engine, AppOptions("tiny", max_body_bytes=1000)) as server:
        response = httpx.post(server.url + COMPLETE, content=content, headers={"Content-Type": "application/json"})
        assert server.metric("ropewalk_disconnects_total") == 0
    error = error_of(response, 413)
    assert error["code"] == "body_too_large" and "larger than 1000 bytes, which is the limit here" in error["message"]


@pytest.mark.parametrize("streams", [False, True])
def test_a_failure_of_the_model_is_told_and_the_server_goes_on(
    server: RunningServer, engine, monkeypatch, streams
) -> None:
    def forward(*args, **kwargs):
        raise CheckpointError("the model computed logits that are not finite")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", forward)
        response = server.post(COMPLETE, {"prompt": "x", "stream": streams})
        if streams:
            events = [line for line in response.text.splitlines() if line]
            error = json.loads(events[0].removeprefix("data: "))["error"]
            assert events[-1] == "data: [DONE]"
            with pytest.raises(openai.APIError, match="not finite"):
                list(server.client.completions.create(model="tiny", prompt="x", stream=True))
        else:
            error = error_of(response, 500)
        assert error["type"] == "server_error" and "not finite" in error["message"]
    assert server.post(COMPLETE, {"prompt": "x"}).status_code == 200


def test_an_unforeseen_failure_tells_the_client_nothing_of_the_inside(server, engine, monkeypatch, caplog) -> None:
    def forward(*args, **kwargs):
        raise ZeroDivisionError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", forward)
        error = error_of(server.post(COMPLETE, {"prompt": "x"}), 500)
    assert error["code"] == "internal_error" and "secret" not in error["message"]
    assert "ZeroDivisionError" in caplog.text
    assert server.post(COMPLETE, {"prompt": "x"}).status_code == 200


def test_without_a_key_nothing_but_health_answers(engine: Engine) -> None:
    with RunningServer(engine, AppOptions("tiny", api_keys=("one", "two"))) as server:
        assert server.client.models.list().data
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        for key in ("three", "Two", "onetwo"):
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0).models.list()
        for headers in (
            {},
            {"Authorization": "one"},
            {"Authorization": "Basic one"},
            {"Authorization": b"Bearer \xfc"},
        ):
            for path in ("/v1/models", "/metrics", "/nowhere", "/openapi.json"):
                response = httpx.get(server.url + path, headers=headers)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "bearer two"}).status_code == 200


def test_pages_of_the_origins_that_were_named_may_use_it(engine: Engine) -> None:
    options = AppOptions("tiny", api_keys=("one",), cors_origins=("http://page.example",))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with RunningServer(engine, options) as server:
        good = httpx.options(server.url + CHAT, headers={"Origin": "http://page.example", **asked})
        bad = httpx.options(server.url + CHAT, headers={"Origin": "http://evil.example", **asked})
        refused = httpx.get(f"{server.url}/v1/models", headers={"Origin": "http://page.example"})
    assert good.headers["access-control-allow-origin"] == "http://page.example"
    assert "access-control-allow-origin" not in bad.headers
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "http://page.example"
