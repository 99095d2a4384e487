"""What ropewalk warns of is on the page, where the person sits."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from ropewalk.faces.webui.hooks.messages import decision
from ropewalk.faces.webui.listening import warnings_heard
from webui_support import press_load


def fill_fields(webui: SimpleNamespace, **changes: float) -> None:
    """Select the embedded model and change fields."""
    webui.models_settings.update_model_parameters(webui.models_settings.get_model_metadata("demo"))
    vars(webui.shared.args).update(changes)


def test_a_context_beyond_what_is_covered_is_warned_of_on_the_page(webui: SimpleNamespace) -> None:
    fill_fields(webui, ctx_size=4096)
    assert "**Warning:** a context of 4096 is beyond the 512 positions" in decision("demo")
    text = press_load(webui, "demo", "ropewalk")
    assert text.startswith("Successfully loaded") and text.count("beyond the 512 positions") == 1


def test_both_scalings_set_are_said_to_multiply_on_page_and_console(webui: SimpleNamespace) -> None:
    fill_fields(webui, compress_pos_emb=2, alpha_value=2, ctx_size=2048)
    text = press_load(webui, "demo", "ropewalk").replace("\\_", "_")
    assert text.startswith("Successfully loaded") and text.count("they multiply: together they reach for 4 times") == 1
    assert any("they multiply" in line for line in webui.console)


def test_a_model_without_trouble_has_no_warning(webui: SimpleNamespace) -> None:
    fill_fields(webui)
    assert "Warning" not in press_load(webui, "demo", "ropewalk")


def test_a_lora_made_for_another_rope_is_warned_of_on_the_page(loaded: SimpleNamespace, root: Path) -> None:
    folder = shutil.copytree(root / "loras" / "storm", root / "loras" / "stretched")
    config = folder / "adapter_config.json"
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    config.write_text(json.dumps(json.loads(config.read_text()) | scaling))
    try:
        *_, text = loaded.ui_model_menu.load_lora_wrapper(["stretched"])
    finally:
        shutil.rmtree(folder)
    assert "Successfully applied" in text and "**Warning:** adapter 'stretched'" in text
    assert "made for another RoPE" in text


def test_warnings_of_others_are_not_shown_as_ours(webui: SimpleNamespace) -> None:
    with warnings_heard() as heard:
        webui.logging_colors.logger.warning("something else")
        logging.getLogger("ropewalk.rope").warning("ours")
    logging.getLogger("ropewalk.rope").warning("after")
    assert heard == ["ours"]
