"""The Model tab: our fields in it, and what it says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from ropewalk.faces.webui.parameters import PARAMETERS
from webui_support import build_page, reply

OWN_NAMES = {item.name for item in PARAMETERS} - {"ctx_size", "cache_type", "threads"}


def test_a_lora_that_cannot_be_loaded_leaves_those_in_use_and_says_why(loaded: SimpleNamespace) -> None:
    loaded.LoRA.add_lora_to_model(["storm"])
    texts = list(loaded.ui_model_menu.load_lora_wrapper(["storm", "bad"]))
    assert "not applied" in texts[-1] and "adapter\\_config.json" in texts[-1] and "In use: storm" in texts[-1]
    assert loaded.shared.model.used_adapters == (("storm", 1.0),)


def test_the_page_has_a_field_for_every_setting_beside_those_of_the_web_ui(webui: SimpleNamespace) -> None:
    shown, gathered = build_page(webui)
    components = webui.shared.gradio
    assert {components[name] for name in OWN_NAMES} <= set(shown) & set(gathered)
    assert all(components[name].parent is components["main"] for name in OWN_NAMES)
    assert components["main"].parent is not components["main"]
    assert "fp32" in dict(components["cache_type"].choices)
    assert "ropewalk: Type of cached keys" in components["cache_type"].info
    assert set(webui.loaders.loaders_and_params["ropewalk"]) >= OWN_NAMES
    assert not OWN_NAMES & set(webui.loaders.loaders_and_params["Transformers"])


def test_a_page_that_is_built_again_gets_fields_of_its_own(webui: SimpleNamespace) -> None:
    build_page(webui)
    first = {name: webui.shared.gradio[name] for name in OWN_NAMES}
    build_page(webui)
    assert all(webui.shared.gradio[name] is not component for name, component in first.items())
    names = webui.loaders.loaders_and_params["ropewalk"]
    assert len(names) == len(set(names))


def test_a_page_that_our_fields_do_not_fit_into_still_comes_up(
    webui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gradio

    def broken(**properties: object) -> None:
        raise TypeError("another gradio")

    monkeypatch.setattr(gradio, "Number", broken)
    build_page(webui)
    assert "could not be added" in webui.console[-1] and "another gradio" in webui.console[-1]
    assert not OWN_NAMES & set(webui.loaders.loaders_and_params["ropewalk"])


def test_settings_are_saved_and_come_back(webui: SimpleNamespace, root: Path) -> None:
    build_page(webui)
    state = {**webui.models_settings.get_model_metadata("demo"), "cpu": False, "no_use_fast": False, "threads": 0}
    try:
        state |= {"cache_type": "fp16", "rope_method": "yarn", "rope_factor": 4}
        webui.models_settings.save_model_settings("demo", state)
        saved = webui.shared.load_user_config()["demo$"]
        assert saved["loader"] == "ropewalk" and set(saved) >= OWN_NAMES
        assert webui.models_settings.get_model_metadata("demo")["rope_factor"] == 4
    finally:
        (root / "models" / "config-user.yaml").unlink()


def test_the_page_says_what_was_decided_when_a_model_is_selected(webui: SimpleNamespace) -> None:
    webui.models_settings.update_model_parameters(webui.models_settings.get_model_metadata("demo"))
    *_, text = webui.ui_model_menu.load_model_wrapper("demo", "llama.cpp", autoload=False)  # the one before
    assert "Max sequence length: 512\n- llama" in text and "RoPE scaling: none" in text and "4-bit" in text


def test_the_page_says_why_a_model_was_not_loaded_and_the_one_before_still_runs(loaded: SimpleNamespace) -> None:
    before = reply(loaded)
    *_, text = loaded.ui_model_menu.load_model_wrapper("cut", "ropewalk", autoload=True)
    assert "Failed to load `cut`" in text and "`demo` is still loaded" in text and "Traceback" not in text
    assert reply(loaded) == before


def test_the_page_loads(webui: SimpleNamespace) -> None:
    webui.models_settings.update_model_parameters(webui.models_settings.get_model_metadata("demo"))
    first, *_, last = webui.ui_model_menu.load_model_wrapper("demo", "ropewalk", autoload=True)
    assert first.startswith("Loading") and last.startswith("Successfully loaded `demo`")
    assert "RoPE scaling" in last


def test_the_truncation_length_follows_the_context(loaded: SimpleNamespace) -> None:
    update = loaded.ui_model_menu.update_truncation_length
    assert loaded.shared.settings["truncation_length"] == 256
    assert update(8192, {"loader": "ropewalk", "ctx_size": 512}) == 256
    assert update(8192, {"loader": "ExLlamav3_HF", "ctx_size": 512}) == 512
    loaded.models.unload_model()
    assert update(8192, {"loader": "ropewalk", "ctx_size": 512}) == 512
