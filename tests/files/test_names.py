"""files/names.py: what is a path, what is a name, and what a folder of the shared cache is called."""

from __future__ import annotations

from pathlib import Path

import pytest

import ropewalk
from ropewalk.base.errors import ConfigError
from ropewalk.files.local import local_folder
from ropewalk.files.names import ModelName, parse_name, shown_name


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("TheBloke/Llama-2-7B-GPTQ", "TheBloke/Llama-2-7B-GPTQ", None),
        (
            "TheBloke/Llama-2-7B-GPTQ:gptq-4bit-32g-actorder_True",
            "TheBloke/Llama-2-7B-GPTQ",
            "gptq-4bit-32g-actorder_True",
        ),
        ("Qwen/Qwen3-4B-AWQ:refs/pr/1", "Qwen/Qwen3-4B-AWQ", "refs/pr/1"),
        ("a/b.c_d-0:0123abc", "a/b.c_d-0", "0123abc"),
    ],
)
def test_a_name_has_an_owner_a_model_and_perhaps_a_revision(text: str, repo: str, revision: str | None) -> None:
    name = parse_name(text)
    assert name == ModelName(repo, revision)
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "model",
            "./a/b",
            "../a/b",
            "~/a/b",
            "/a/b",
            "a/b/c",
            "a\\b",
            "a/",
            "/b",
            "",
            "a/b:",
            "a//b",
            "a/b c",
            "a/b\n",
        ),
        *("a/b.gguf", "a/b.safetensors", "a/..b", "-a/b", "C:/models", "a/b\0", "é/b", "x" * 5000, "a/" + "x" * 5000),
    ],
)
def test_everything_else_is_a_path(text: str) -> None:
    assert parse_name(text) is None


def test_a_path_that_exists_wins_and_one_below_a_folder_that_exists_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_name("models/llama") is not None
    (tmp_path / "models").mkdir()
    assert parse_name("models/llama") is None
    with pytest.raises(ConfigError, match="model folder models/llama does not exist"):
        ropewalk.load_model("models/llama")
    (tmp_path / "models" / "llama").mkdir()
    assert local_folder("models/llama") == Path("models/llama")


def test_a_path_object_is_never_a_name() -> None:
    with pytest.raises(ConfigError, match="model folder nobody/nothing does not exist"):
        ropewalk.load_model(Path("nobody/nothing"))


def test_a_folder_of_the_cache_is_called_by_the_models_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--TheBloke--Llama-2-7B-GPTQ" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert shown_name(snapshot) == "Llama-2-7B-GPTQ"
    assert shown_name(tmp_path) == tmp_path.name
