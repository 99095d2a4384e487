"""Folders and tokenizers that cannot be loaded: named at selection, refused in words, the model before kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from ropewalk.base.errors import ConfigError, RopewalkError
from ropewalk.faces.webui.hooks import model_defaults
from ropewalk.faces.webui.tokenizer_check import check_tokenizer
from webui_support import press_load, reply, running_webui, select, start

UNSUPPORTED = ("falcon", "awq")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_quantised_folder_is_named_when_it_is_selected(webui: SimpleNamespace, name: str) -> None:
    assert webui.models_settings.get_model_metadata(name)["loader"] == "ropewalk"
    text = select(webui, name)
    assert "ropewalk cannot load this model" in text and name in text.partition("cannot load")[2]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_quantised_folder_is_refused_in_words_and_the_model_before_still_runs(
    loaded: SimpleNamespace, name: str
) -> None:
    before = reply(loaded)
    text = press_load(loaded, name, "ropewalk")
    assert text.startswith(f"Failed to load `{name}`") and "not supported" in text
    assert "`demo` is still loaded" in text and "Traceback" not in text
    assert reply(loaded) == before


@pytest.mark.parametrize(("name", "advice"), [("falcon", "does not read it either"), ("demo", "choose ropewalk")])
def test_a_loader_that_lacks_its_package_is_not_tried_on_a_quantised_folder(
    loaded: SimpleNamespace, name: str, advice: str
) -> None:
    before = reply(loaded)
    text = press_load(loaded, name, "Transformers")
    assert "needs gptqmodel" in text and advice in text and "`demo` is still loaded" in text
    assert reply(loaded) == before
    with pytest.raises(RopewalkError, match="needs gptqmodel"):
        loaded.api_models._load_model({"model_name": name, "args": {"loader": "Transformers"}})
    assert reply(loaded) == before


def test_an_unsupported_folder_is_left_to_a_loader_that_has_its_package(
    webui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_defaults, "reads_gptq", lambda loader: loader == "Transformers")
    metadata = webui.models_settings.get_model_metadata
    assert metadata("falcon")["loader"] == "Transformers"
    assert metadata("demo")["loader"] == "ropewalk"
    assert "ropewalk cannot load this model" in select(webui, "falcon")


def test_folders_for_other_loaders_get_no_remark(webui: SimpleNamespace) -> None:
    assert "ropewalk" not in select(webui, "dense")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mute", "has no tokenizer: tokenizer.json or tokenizer.model is needed"), ("garbled", "cannot be loaded: ")],
)
def test_a_tokenizer_that_cannot_be_loaded_is_found_before_the_model_before_is_unloaded(
    loaded: SimpleNamespace, name: str, reason: str
) -> None:
    before = reply(loaded)
    text = press_load(loaded, name, "ropewalk").replace("\\_", "_")
    assert reason in text and "`demo` is still loaded" in text
    with pytest.raises(ConfigError, match=reason):
        loaded.api_models._load_model({"model_name": name})
    assert reply(loaded) == before and loaded.shared.model_name == "demo"


def test_a_tokenizer_that_cannot_be_loaded_is_said_at_the_start(root: Path) -> None:
    with running_webui(root, "--model", "mute", "--loader", "ropewalk") as modules:
        start(modules)
        assert modules.shared.model is None
        assert "has no tokenizer" in modules.console[-1] and "Traceback" not in modules.console[-1]


def test_a_list_of_special_tokens_under_transformers_4_is_explained(
    webui: SimpleNamespace, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(root / "models" / "demo", root / "models" / "list")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"extra_special_tokens": ["<|x|>"]}))

    def load_tokenizer(name: str) -> None:  # as transformers 4 does, whichever runs these tests
        raise AttributeError("'list' object has no attribute 'keys'")

    monkeypatch.setattr(webui.models, "load_tokenizer", load_tokenizer, raising=False)
    monkeypatch.setattr("ropewalk.faces.webui.tokenizer_check.version", lambda package: "4.57.6")
    try:
        with pytest.raises(ConfigError, match=r"extra_special_tokens .* is a list.*additional_special_tokens"):
            check_tokenizer("list")
    finally:
        shutil.rmtree(folder)
