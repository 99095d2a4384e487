"""Errors of other loaders, which pass through our hooks: nobody sees that they did. Ours keep where they come from."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import ropewalk
from ropewalk.base.errors import RopewalkError

PACKAGE = str(Path(ropewalk.__file__).parent)
LOADERS = {"Transformers": "transformers_loader", "llama.cpp": "llama_cpp_server_loader"}


def text_of(failed: pytest.ExceptionInfo) -> str:
    return "".join(traceback.format_exception(failed.value))


@pytest.mark.parametrize("loader", LOADERS)
def test_an_error_of_another_loader_shows_no_frame_of_ours(webui: SimpleNamespace, loader: str) -> None:
    with pytest.raises((ImportError, RuntimeError)) as failed:
        webui.models.load_model("dense", loader)
    assert PACKAGE not in text_of(failed)
    assert [frame.name for frame in traceback.extract_tb(failed.tb)][1:3] == ["load_model", LOADERS[loader]]


@pytest.mark.parametrize("loader", LOADERS)
def test_the_page_shows_the_error_of_another_loader_without_us(webui: SimpleNamespace, loader: str) -> None:
    *_, text = webui.ui_model_menu.load_model_wrapper("dense", loader, autoload=True)
    assert text.startswith("Traceback") and PACKAGE not in text


def test_an_error_of_peft_on_a_model_of_another_loader_shows_no_frame_of_ours(
    webui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webui.shared, "model", "a model of transformers")
    with pytest.raises(RuntimeError, match="PEFT") as failed:
        webui.LoRA.add_lora_to_model(["storm"])
    assert PACKAGE not in text_of(failed)


def test_a_reply_that_fails_shows_no_frame_of_ours(webui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(generate=None)
    monkeypatch.setattr(webui.shared, "model", model)
    with pytest.raises(RuntimeError, match="cuda") as failed:
        list(webui.text_generation.generate_reply([1], {"max_new_tokens": 1}))
    assert PACKAGE not in text_of(failed)


def test_an_error_of_ours_keeps_its_frames(webui: SimpleNamespace) -> None:
    with pytest.raises(RopewalkError) as failed:
        webui.models.load_model("cut", "ropewalk")
    assert PACKAGE in text_of(failed)


def test_an_unexpected_error_within_ropewalk_keeps_its_frames(
    webui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ropewalk.faces.hf.causal_lm.load_model", lambda *args, **options: {}["mistake"])
    with pytest.raises(KeyError) as failed:
        webui.models.load_model("demo", "ropewalk")
    assert PACKAGE in text_of(failed)
