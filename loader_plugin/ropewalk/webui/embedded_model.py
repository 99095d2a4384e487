"""The embedded model as a folder among the models of the web UI, for who has no model at hand."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

from ropewalk.demo import demo_model_path
from ropewalk.errors import ConfigError
from ropewalk.webui.checkout import Checkout

FOLDER = "ropewalk-demo"


def copy_model(checkout: Checkout) -> Path:
    """Copy it; the folder.

    Raises:
        ConfigError: the folder exists, there is no folder for models, or it cannot be written.
    """
    folder = checkout.models / FOLDER
    if folder.exists():
        raise ConfigError(f"{folder} exists already: nothing was copied")
    if not checkout.models.is_dir():
        raise ConfigError(f"{checkout.models} does not exist: name the folder of models with --model-dir")
    try:
        shutil.copytree(demo_model_path(), folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def remove_model(checkout: Checkout) -> str | None:
    """Remove the copy if it is as it was made. What was done, or None if there is none."""
    folder = checkout.models / FOLDER
    if not folder.is_dir():
        return None
    files = _files(demo_model_path())
    if _files(folder) != files or filecmp.cmpfiles(demo_model_path(), folder, files, shallow=False)[0] != files:
        return f"{folder} has been changed and was left: remove it if you do not need it"
    shutil.rmtree(folder)
    return f"removed {folder}"


def _files(folder: Path) -> list[str]:
    """Every file below a folder, by its path in there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
