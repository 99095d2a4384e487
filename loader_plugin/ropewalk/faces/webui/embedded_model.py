"""The embedded model as a folder among the models of the web UI, for people who have no model at hand."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path

from ropewalk.base.errors import ConfigError
from ropewalk.base.json import Section, read_json_object
from ropewalk.faces.webui.checkout import Checkout
from ropewalk.files.embedded import EMBEDDED_CONTEXT, demo_model_path

FOLDER = "ropewalk-demo"
CONFIG = "config.json"
DEFAULT_ADAPTERS = "default_adapters"  # a key of config.json: names of folders in adapters/


def copy_model(checkout: Checkout) -> Path:
    """Copy the model, with a config.json that asks for a longer context, and return the folder. The web UI reserves 512
    tokens for the reply alone, which is the whole context that the model was trained on.

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
        (folder / CONFIG).write_bytes(_extended_config())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def default_adapters(folder: Path) -> list[Path]:
    """The LoRAs that a folder asks for until others are chosen: those named in its config.json.

    Raises:
        ConfigError: no list of names of its adapters.
    """
    section = Section(str(folder / CONFIG), read_json_object(folder / CONFIG))
    names = section.values.get(DEFAULT_ADAPTERS) or []
    if not isinstance(names, list) or not all(map(_is_name, names)):
        raise section.error(DEFAULT_ADAPTERS, f"a list of names of folders in {folder / 'adapters'}")
    return [folder / "adapters" / name for name in names]


def remove_model(checkout: Checkout) -> str | None:
    """Remove the copy if it is unchanged. Returns what was done, or None if there is no copy."""
    folder = checkout.models / FOLDER
    if not folder.is_dir():
        return None
    if not _is_as_made(folder):
        return f"{folder} has been changed and was left: remove it if you do not need it"
    shutil.rmtree(folder)
    return f"removed {folder}"


def _is_name(value: object) -> bool:
    """Whether it names something in a folder, and leads nowhere else."""
    return isinstance(value, str) and value not in ("", ".", "..") and value == Path(value).name


def _extended_config() -> bytes:
    """config.json of the copy."""
    config = json.loads((demo_model_path() / CONFIG).read_text(encoding="utf-8"))
    length = config["max_position_embeddings"]
    scaling = EMBEDDED_CONTEXT.scaling | {"original_max_position_embeddings": length}
    changes = {
        "max_position_embeddings": int(EMBEDDED_CONTEXT.factor * length),
        "rope_parameters": config["rope_parameters"] | scaling,
        DEFAULT_ADAPTERS: [EMBEDDED_CONTEXT.adapter],
    }
    return (json.dumps(config | changes, indent=2) + "\n").encode("utf-8")


def _is_as_made(folder: Path) -> bool:
    """True if the copy has every file, unchanged, and nothing else."""
    files = _files(demo_model_path())
    if _files(folder) != files or (folder / CONFIG).read_bytes() != _extended_config():
        return False
    copied = [file for file in files if file != CONFIG]
    return filecmp.cmpfiles(demo_model_path(), folder, copied, shallow=False)[0] == copied


def _files(folder: Path) -> list[str]:
    """Every file below a folder, by its path relative to the folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
