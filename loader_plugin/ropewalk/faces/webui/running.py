"""The running web UI: its modules, the folder of a model by name, and whether the loaded model is ours."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def webui_module(name: str) -> Any:
    """A module of the running web UI."""
    return importlib.import_module(f"modules.{name}")


def model_folder(model_name: str) -> Path:
    """Where the model of that name lies, by the rules of this version; it may not exist."""
    utils = webui_module("utils")
    if hasattr(utils, "resolve_model_path"):
        return Path(utils.resolve_model_path(model_name))
    named = Path(webui_module("shared").args.model_dir) / str(model_name)
    return Path(model_name) if model_name and Path(model_name).is_dir() and not named.exists() else named


def is_ours(model: Any) -> bool:
    """True for a model that this loader has loaded. Imports nothing."""
    hf = sys.modules.get("ropewalk.faces.hf")
    return hf is not None and isinstance(model, hf.RopewalkForCausalLM)
