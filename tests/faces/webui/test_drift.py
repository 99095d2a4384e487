"""The names that our hooks use, in the stand-in, and in a real web UI where `TEXTGEN_WEBUI_DIR` names one."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from ropewalk.faces.cli.webui import missing_names
from ropewalk.faces.webui.checkout import find_checkout
from ropewalk.faces.webui.hooks import HOOKS
from ropewalk.faces.webui.hooks.loading import HELPERS
from webui_support import STAND_IN

REAL = os.environ.get("TEXTGEN_WEBUI_DIR")
# What the hooks use of other modules than their own, or of either of two.
ALSO_USED = {
    "modules.utils": ({"resolve_model_path"}, {"get_available_models"}),  # before v3.1 there is no function for paths
    "modules.models": ({HELPERS[0]}, {HELPERS[1]}),
    "modules.shared": ({"args", "settings", "gradio", "model", "model_name", "lora_names", "generation_lock"},),
    "modules.loaders": ({"list_all_samplers", "get_all_params"},),
    "modules.models_settings": ({"update_model_parameters", "save_model_settings"},),
}


def check(folder: Path) -> None:
    checkout = find_checkout(folder)
    assert missing_names(checkout) == []
    for module, alternatives in ALSO_USED.items():
        defined = checkout.defined_names(module)
        assert defined is not None, f"{folder} has no {module}"
        lacking = [sorted(names - defined) for names in alternatives]
        assert [] in lacking, f"{module} lacks {' or '.join(map(str, lacking))}"
    elements = [checkout.defined_names(module) or set() for module in ("modules.loaders", "modules.ui")]
    assert any("list_model_elements" in names for names in elements)
    tokenizers = [
        checkout.defined_names(module) or set() for module in ("modules.models", "modules.transformers_loader")
    ]
    assert any("load_tokenizer" in names for names in tokenizers)


@pytest.mark.skipif(REAL is None, reason="TEXTGEN_WEBUI_DIR names no text-generation-webui")
def test_the_real_web_ui_has_every_name_that_the_hooks_use() -> None:
    check(Path(str(REAL)))


def test_the_stand_in_has_every_name_that_the_hooks_use() -> None:
    modules = {hook.module for hook in HOOKS if hook.names}
    existing = {module for module in modules if (STAND_IN / (module.replace(".", "/") + ".py")).is_file()}
    # where versions before v4.1 have what modules.api.models and modules.api.script are
    assert modules - existing == {"extensions.openai.models", "extensions.openai.script"}
    assert missing_names(find_checkout(STAND_IN)) == []


@pytest.mark.skipif(REAL is None, reason="TEXTGEN_WEBUI_DIR names no text-generation-webui")
def test_the_stand_in_has_no_function_that_the_real_web_ui_lacks() -> None:
    real = Path(str(REAL))
    sources = [*(real / "modules").rglob("*.py"), *(real / "extensions" / "openai").glob("*.py")]
    everywhere = {name for path in sources for name in functions(path)}  # some have moved between versions
    if HELPERS[0] not in everywhere:  # before v3.0
        everywhere |= {HELPERS[0], "load_model_HF", "resolve_model_path"}
    for path in sorted((STAND_IN / "modules").rglob("*.py")):
        assert functions(path) <= everywhere, path.name


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
