"""Replies and conversations that outgrow the window, as requests and the start of the server ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from gptq_writer import write_checkpoint
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.app import AppOptions
from ropewalk.model.loader import load_model
from ropewalk.text.tokenizer.load import load_tokenizer
from server_runner import RunningServer
from tokenizer_writer import write_sentencepiece

WINDOW = 256
PROMPT = [(place * 37 + place // 7) % 390 + 5 for place in range(WINDOW - 6)]
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, {"vocab_size": 400, "max_position_embeddings": WINDOW}, desc_act=True)
    return write_sentencepiece(path)


def server_of(folder: Path, context_shift: bool | int = False) -> RunningServer:
    model = load_model(folder, threads=1, backend="cpu")
    engine = Engine(model, load_tokenizer(folder), "plain", context_shift=context_shift)
    return RunningServer(engine, AppOptions("tiny"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with server_of(folder) as running:
        yield running


def completed(server: RunningServer, tokens: int, **options) -> tuple[str, str, int]:
    """(text, why it ended, tokens written)."""
    extra = GREEDY["extra_body"] | options
    done = server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=tokens, temperature=0, extra_body=extra
    )
    return done.choices[0].text, done.choices[0].finish_reason, done.usage.completion_tokens


def conversation(turns: int) -> list[dict[str, str]]:
    found = [{"role": "system", "content": "Be brief."}]
    for turn in range(turns):
        found += [{"role": "user", "content": f"Question {turn}? " * 3}, {"role": "assistant", "content": "An answer."}]
    return [*found, {"role": "user", "content": "And now?"}]


def test_a_reply_goes_on_beyond_the_window_where_its_request_asks_for_it(server: RunningServer) -> None:
    text, reason, tokens = completed(server, 60, context_shift=10)
    assert (reason, tokens) == ("length", 60)
    cut, reason, tokens = completed(server, 60)
    assert (reason, tokens) == ("length", 7) and text.startswith(cut)


def test_a_server_that_shifts_does_so_for_requests_that_do_not_say(server: RunningServer, folder: Path) -> None:
    with server_of(folder, context_shift=10) as shifting:
        assert completed(shifting, 40) == completed(server, 40, context_shift=10)
        assert completed(shifting, 40, context_shift=False)[2] == 7


def test_a_conversation_loses_its_oldest_turns_instead_of_being_refused(server: RunningServer) -> None:
    asked = {"model": "tiny", "messages": conversation(12), "max_tokens": 16, "temperature": 0}
    with pytest.raises(openai.BadRequestError, match="context") as error:
        server.client.chat.completions.create(**asked)
    assert error.value.code == "context_length_exceeded"
    done = server.client.chat.completions.create(**asked, extra_body={"context_shift": True})
    assert done.usage.prompt_tokens + 16 <= WINDOW


@pytest.mark.parametrize("value", [0, -1, "much", 1.5])
def test_what_is_not_a_shift_is_refused_by_name(server: RunningServer, value: object) -> None:
    refused = server.post("/v1/completions", {"prompt": "rope", "context_shift": value})
    assert refused.status_code == 400 and "context_shift" in refused.json()["error"]["message"]
