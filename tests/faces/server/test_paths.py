"""faces/server/paths.py: no answer tells where the server's files lie; its log does."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fake_model import FakeModel
from ropewalk.base.errors import CheckpointError, ConfigError
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.app import AppOptions
from ropewalk.faces.server.middleware import access_log
from ropewalk.faces.server.paths import PathHider
from ropewalk.text.chat import ChatTemplate
from ropewalk.text.tokenizer.load import load_tokenizer
from server_runner import RunningServer
from tokenizer_writer import write_sentencepiece

TALK = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("/data/my models/llama 2/config.json: rope_theta", "config.json: rope_theta"),
        ("/data/my models/llama 2 brings no chat template", "llama 2 brings no chat template"),
        ("models/llama/tokenizer.json is damaged", "tokenizer.json is damaged"),
        ("see /opt/venv/lib/python3.11/site-packages/x.py, line 3", "see x.py, line 3"),
        ("[Errno 2] No such file or directory: '/home/a b/c d.txt'", "[Errno 2] No such file or directory: 'c d.txt'"),
        ("the file C:\\Users\\me\\model.bin is gone.", "the file model.bin is gone."),
        ("look in /data/models/x.", "look in x."),
        ("replies end at </s> or 1/2 of 3 / 4", "replies end at </s> or 1/2 of 3 / 4"),
        ("see https://example.com/a/b/c", "see https://example.com/a/b/c"),
    ],
)
def test_of_a_path_the_name_at_its_end_is_left(message: str, shown: str) -> None:
    hider = PathHider([Path("/data/my models/llama 2"), Path("models/llama"), Path()])
    assert hider.hide(message) == shown


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("error", [CheckpointError, ConfigError])
def test_no_answer_tells_where_files_lie_and_the_log_does(tmp_path: Path, monkeypatch, caplog, streams, error) -> None:
    folder = write_sentencepiece(tmp_path / "my models" / "llama")
    tokenizer = load_tokenizer(folder)
    engine = Engine(FakeModel(tokenizer.vocab_size), tokenizer, "vicuna")
    message = f"{folder / 'model.safetensors'} was truncated, and so was {tmp_path}/other/file.bin"

    def forward(*args, **kwargs):
        raise error(message)

    monkeypatch.setattr(engine.model, "forward", forward)
    monkeypatch.setattr(access_log, "propagate", True)
    with caplog.at_level(logging.INFO), RunningServer(engine, AppOptions("tiny")) as server:
        response = server.post("/v1/completions", {"prompt": "x", "stream": streams})
    text = response.text
    assert "model.safetensors was truncated, and so was file.bin" in text
    assert str(tmp_path) not in text and "my models" not in text
    assert message[:100] in caplog.text


def test_a_template_that_fails_does_not_tell_where_it_lies(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path))
    template = ChatTemplate("{{ messages[9].content.x.y }}", str(tmp_path / "chat_template.jinja"))
    with RunningServer(Engine(FakeModel(tokenizer.vocab_size), tokenizer, template), AppOptions("tiny")) as server:
        response = server.post("/v1/chat/completions", {"messages": TALK})
    assert response.status_code == 400
    assert "the chat template of chat_template.jinja failed" in response.json()["error"]["message"]
    assert str(tmp_path) not in response.text
    assert json.loads(response.text)
