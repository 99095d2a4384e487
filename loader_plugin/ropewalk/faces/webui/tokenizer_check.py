"""Whether the web UI can load the tokenizer of a model; checked while the previous model still runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ropewalk.base.errors import ConfigError
from ropewalk.faces.webui.running import model_folder, webui_module

# What a tokenizer of transformers is made from; a folder has at least one.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
SETTINGS = "tokenizer_config.json"


def check_tokenizer(model_name: str) -> None:
    """Load the tokenizer as the web UI does, and drop it again.

    Raises:
        ConfigError: there is no tokenizer, or it cannot be loaded; the message says why and what to do.
    """
    folder = model_folder(model_name)
    if not any((folder / name).is_file() for name in FILES):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"{folder} has no tokenizer: tokenizer.json or tokenizer.model is needed (found: {found}); copy it from "
            "the model that this one was quantised from"
        )
    try:
        tokenizer = _loader_of_webui()(model_name)
    except Exception as error:  # transformers has no error of its own for this
        raise ConfigError(f"the tokenizer in {folder} cannot be loaded: {_reason(folder, error)}") from error
    if tokenizer is None:
        raise ConfigError(f"the tokenizer in {folder} cannot be loaded: the web UI found none there")


def _loader_of_webui() -> Callable[[str], Any]:
    """The web UI's function that loads a tokenizer; before v3.0 it is in modules.models."""
    models = webui_module("models")
    return (
        models.load_tokenizer
        if hasattr(models, "load_tokenizer")
        else webui_module("transformers_loader").load_tokenizer
    )


def _reason(folder: Path, error: Exception) -> str:
    transformers = version("transformers")
    if isinstance(_setting(folder, "extra_special_tokens"), list) and transformers.startswith("4."):
        return (
            f"extra_special_tokens in its {SETTINGS} is a list, as transformers 5 writes it, and this web UI has "
            f"transformers {transformers}: rename the key to additional_special_tokens"
        )
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _setting(folder: Path, key: str) -> Any:
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None
