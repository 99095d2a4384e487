"""Prompts that clients ask the server to keep: found again after a restart, listed and deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from ropewalk.engine.engine import Engine
from ropewalk.engine.kept_folder import KeptFolder
from ropewalk.faces.server.app import AppOptions
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.loader import load_model
from ropewalk.text.tokenizer.load import load_tokenizer
from server_runner import RunningServer

TEXT = (
    '"""Words and lines of a text file."""\n\n' + "def read_lines(path):\n    return open(path).readlines()\n\n\n" * 8
)
GREEDY = {"temperature": 0, "max_tokens": 12}


def server_on(folder: Path | None, **options) -> RunningServer:
    model = load_model(demo_model_path(), threads=1, backend="cpu", **options)
    kept = None if folder is None else KeptFolder(folder)
    return RunningServer(
        Engine(model, load_tokenizer(demo_model_path()), "vicuna", kept_folder=kept), AppOptions("demo")
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with server_on(tmp_path_factory.mktemp("kept")) as running:
        yield running


def test_a_kept_prompt_is_not_read_again_after_a_restart(tmp_path: Path) -> None:
    with server_on(tmp_path) as server:
        done = server.client.completions.create(model="demo", prompt=TEXT, **GREEDY, extra_body={"keep": "words"})
        kept = done.model_extra["kept"]
        assert kept["id"] == "words" and kept["tokens"] == done.usage.prompt_tokens
        assert done.usage.prompt_tokens_details.cached_tokens == 0
    with server_on(tmp_path) as server:
        again = server.client.completions.create(model="demo", prompt=TEXT + "class Reader:\n", **GREEDY)
        assert again.usage.prompt_tokens_details.cached_tokens >= kept["tokens"] - 2
        assert server.metric("ropewalk_kept_recalled") == 1
        assert server.metric("ropewalk_kept_bytes") == kept["bytes"]
    with server_on(None) as server:
        plain = server.client.completions.create(model="demo", prompt=TEXT + "class Reader:\n", **GREEDY)
        assert plain.choices[0].text == again.choices[0].text


def test_a_conversation_can_be_kept_and_streams_say_so_at_their_end(first: RunningServer) -> None:
    talk = [{"role": "system", "content": TEXT}, {"role": "user", "content": "Go on."}]
    stream = first.client.chat.completions.create(
        model="demo", messages=talk, **GREEDY, stream=True, extra_body={"keep": "talk"}
    )
    kept = [chunk.model_extra["kept"] for chunk in stream if "kept" in chunk.model_extra]
    assert [entry["id"] for entry in kept] == ["talk"]
    assert first.get("/v1/caches/talk").json()["tokens"] == kept[0]["tokens"]


def test_reading_alone_is_enough(first: RunningServer) -> None:
    done = first.client.completions.create(model="demo", prompt=TEXT, max_tokens=0, extra_body={"keep": "read"})
    assert done.choices[0].text == "" and done.model_extra["kept"]["id"] == "read"


def test_several_replies_to_one_prompt_keep_it_once(first: RunningServer) -> None:
    done = first.client.completions.create(model="demo", prompt=TEXT, n=2, max_tokens=3, extra_body={"keep": "twice"})
    assert len(done.choices) == 2 and done.model_extra["kept"]["id"] == "twice"


def test_kept_prompts_are_listed_and_deleted(first: RunningServer) -> None:
    for name in ("one", "two"):
        first.client.completions.create(model="demo", prompt=name + TEXT, max_tokens=0, extra_body={"keep": name})
    listed = first.get("/v1/caches").json()
    assert [card["id"] for card in listed["data"]][:2] == ["two", "one"]
    assert all(card["usable"] and card["problem"] is None for card in listed["data"])
    assert first.delete("/v1/caches/one").json() == {"id": "one", "object": "cache", "deleted": True}
    assert first.get("/v1/caches/one").status_code == 404
    answer = first.delete("/v1/caches/one")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "cache_not_found")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".x", "x" * 101, "a b"])
def test_names_that_lead_elsewhere_are_refused(name: str, first: RunningServer) -> None:
    body = {"model": "demo", "prompt": "x", "keep": name}
    answer = first.post("/v1/completions", body)
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == ("keep", "cannot_keep")


@pytest.mark.parametrize("name", ["..%2f..%2fetc", "%2e%2e", ".x", "a%00b"])
def test_paths_that_lead_elsewhere_are_refused(name: str, first: RunningServer) -> None:
    for answer in (first.get(f"/v1/caches/{name}"), first.delete(f"/v1/caches/{name}")):
        assert answer.status_code in (400, 404)
        assert "error" in answer.json()


def test_several_prompts_cannot_have_one_name(first: RunningServer) -> None:
    answer = first.post("/v1/completions", {"model": "demo", "prompt": ["a", "b"], "keep": "x"})
    assert answer.status_code == 400 and "keep is for one prompt" in answer.json()["error"]["message"]


def test_what_is_larger_than_the_folder_is_refused(tmp_path: Path) -> None:
    model = load_model(demo_model_path(), threads=1, backend="cpu")
    engine = Engine(model, load_tokenizer(demo_model_path()), "vicuna", kept_folder=KeptFolder(tmp_path, 1000))
    with RunningServer(engine, AppOptions("demo")) as server:
        answer = server.post("/v1/completions", {"model": "demo", "prompt": TEXT, "keep": "x"})
        assert answer.status_code == 400 and "the cache folder may hold 1000 bytes" in answer.json()["error"]["message"]


def test_a_full_disk_is_an_error_of_its_own(first: RunningServer, monkeypatch) -> None:
    def full(*given: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ropewalk.model.saved.write.write_file", full)
    answer = first.post("/v1/completions", {"model": "demo", "prompt": TEXT, "keep": "full", "max_tokens": 0})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "cache_folder_failed")
    assert error["message"] == "full.safetensors cannot be written: No space left on device"  # no folder of ours


def test_files_that_cannot_be_used_say_why_without_paths(first: RunningServer) -> None:
    folder = first.service.engine.kept.folder.folder
    (folder / "broken.safetensors").write_bytes(b"x" * 100)
    card = first.get("/v1/caches/broken").json()
    assert card["usable"] is False and card["tokens"] is None
    assert card["problem"].startswith("broken.safetensors is damaged")
    assert first.delete("/v1/caches/broken").status_code == 200


def test_a_server_without_a_folder_says_so() -> None:
    with server_on(None) as server:
        answer = server.get("/v1/caches")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_cache_folder")
        with pytest.raises(openai.BadRequestError, match="started without --cache-folder"):
            server.client.completions.create(model="demo", prompt="x", extra_body={"keep": "x"})
