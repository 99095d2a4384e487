"""Chats through the server: of models that bring no template, and in the orders of roles that other programs send."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fake_model import FakeModel
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.app import AppOptions
from ropewalk.text.tokenizer.load import load_tokenizer
from server_runner import RunningServer
from tokenizer_writer import write_byte_level_json, write_config

CHAT = "/v1/chat/completions"
# As SillyTavern 1.19 sends a chat with a character that greets first, and asks to continue a reply.
SETTINGS = {
    "temperature": 1,
    "seed": 1,  # the model is free to end at any token: not by chance in one run of many
    "stream": True,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_p": 1,
    "max_tokens": 3,
}
PLAY = [
    {"role": "system", "content": "Write Ann's next reply."},
    {"role": "system", "content": "Ann likes tea."},
    {"role": "system", "content": "[Start a new Chat]"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Hi."},
    {"role": "user", "content": "Tea?"},
    {"role": "system", "content": "[Continue your last message without repeating its original content.]"},
]
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


def engine_of(folder: Path, template: str | None = None) -> Engine:
    tokenizer = load_tokenizer(write_byte_level_json(folder))
    return Engine(FakeModel(tokenizer.vocab_size, capacity=1024), tokenizer, template)


@pytest.fixture(params=["vicuna", "llama-2", "alpaca", "airoboros", "plain", "text", None])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningServer]:
    with RunningServer(engine_of(tmp_path, request.param), AppOptions("tiny")) as running:
        yield running


def test_every_format_answers_what_role_playing_programs_send(server: RunningServer) -> None:
    for messages in (PLAY, PLAY[:4], PLAY[3:], [{"role": "user", "content": ""}, *PLAY[4:]]):
        response = server.post(CHAT, {"messages": messages, "max_tokens": 2, "temperature": 0})
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == 2


def test_what_sillytavern_sends_is_answered_as_it_is_written(server: RunningServer) -> None:
    key = {"Authorization": "Bearer"}  # it has none
    sent = {"model": "tiny", "messages": PLAY, **SETTINGS, "top_k": 20, "min_p": 0.05}
    with httpx.stream("POST", server.url + CHAT, json=sent, headers=key, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert response.status_code == 200
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    response = server.post(
        "/v1/completions", {"prompt": "Ann:", **SETTINGS, "stream": False, "stop": ["\nUser:", "\n***"]}
    )
    assert response.status_code == 200


def test_a_model_without_a_template_answers_and_the_log_says_once_what_to_choose(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    with caplog.at_level(logging.WARNING), RunningServer(engine_of(folder), AppOptions("tiny")) as server:
        replies = [server.post(CHAT, {"messages": PLAY, "max_tokens": 2}) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert all(str(tmp_path) not in reply.text for reply in replies)
    [warning] = [record.getMessage() for record in caplog.records if record.name == "ropewalk.text.chat"]
    assert warning.startswith("my-model brings no chat template")
    assert "--chat-template NAME (vicuna, llama-2, alpaca, airoboros, plain, text)" in warning


def test_a_template_that_wants_turns_is_given_turns(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    write_config(tmp_path, chat_template=ALTERNATING)
    with RunningServer(engine, AppOptions("tiny")) as server:
        assert server.post(CHAT, {"messages": PLAY, "max_tokens": 2}).status_code == 200


def test_a_template_that_hangs_is_told_to_the_client_in_words_without_a_path(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    write_config(tmp_path, chat_template="{% set x = 9 ** (9 ** 9) %}")
    with RunningServer(engine, AppOptions("tiny")) as server:
        response = server.post(CHAT, {"messages": PLAY})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert f"the chat template of {tmp_path.name}/tokenizer_config.json failed (it ran longer than 2 s)" in message
    assert str(tmp_path) not in message
