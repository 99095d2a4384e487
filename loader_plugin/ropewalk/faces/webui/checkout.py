"""A text-generation-webui on disk: where its files lie in each version, and what its modules define."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from ropewalk.base.errors import ConfigError
from ropewalk.base.home import home_expanded

NAME = "ropewalk"


@dataclass(frozen=True, slots=True)
class Checkout:
    """A folder with server.py and modules/. user_data: where models and settings lie, which `--user-data-dir` can move;
    before v3.1 the folder itself. models: the folder of models, which `--model-dir` can move."""

    folder: Path
    user_data: Path
    models: Path

    @property
    def extension(self) -> Path:
        """The folder of our extension: below user_data from v3.7 on, beside the built-in ones before that."""
        return (self.user_data if self._has_user_extensions() else self.folder) / "extensions" / NAME

    @property
    def settings_files(self) -> tuple[Path, ...]:
        """The existing yaml files that may name our loader."""
        files = (
            *(place / "settings.yaml" for place in (self.folder, self.user_data)),
            *(
                models / "config-user.yaml"
                for models in (self.models, self.folder / "models", self.user_data / "models")
            ),
        )
        return tuple(path for path in dict.fromkeys(files) if path.is_file())

    @property
    def flag_files(self) -> tuple[Path, ...]:
        """The existing files with flags that count at every start."""
        places = dict.fromkeys((self.folder, self.user_data))
        return tuple(place / "CMD_FLAGS.txt" for place in places if (place / "CMD_FLAGS.txt").is_file())

    @property
    def own_python(self) -> Path | None:
        """The environment that the web UI's installer made for it; None if it made none."""
        environment = self.folder / "installer_files" / "env"
        return environment if environment.is_dir() else None

    def knows(self, setting: str) -> bool:
        """True if this version has a setting of that name for one of its own loaders."""
        table = self.folder / "modules" / "loaders.py"
        return table.is_file() and re.search(rf"""['"]{setting}['"]""", table.read_text(encoding="utf-8")) is not None

    def defined_names(self, module: str) -> set[str] | None:
        """What a module defines or imports at its top level; None if this version has no such module."""
        path = self.folder.joinpath(*module.split(".")).with_suffix(".py")
        if not path.is_file():
            return None
        return {name for node in ast.parse(path.read_text(encoding="utf-8")).body for name in _names_of(node)}

    def _has_user_extensions(self) -> bool:
        source = (self.folder / "modules" / "extensions.py").read_text(encoding="utf-8")
        return "user_data" in source


def find_checkout(folder: Path, user_data: Path | None = None, models: Path | None = None) -> Checkout:
    """The web UI in this folder.

    user_data, models: the server's --user-data-dir and --model-dir, if it is started with them; relative to the folder.

    Raises:
        ConfigError: the folder is not a web UI, or user_data or models does not exist.
    """
    folder = home_expanded(folder).resolve()
    for needed in ("server.py", "modules/extensions.py", "modules/text_generation.py"):
        if not (folder / needed).is_file():
            raise ConfigError(f"{folder} is not a folder of text-generation-webui: it has no {needed}")
    default = folder / "user_data" if (folder / "user_data").is_dir() else folder
    chosen = _given("--user-data-dir", folder, user_data) or default
    return Checkout(folder, chosen, _given("--model-dir", folder, models) or chosen / "models")


def _given(option: str, folder: Path, path: Path | None) -> Path | None:
    if path is None:
        return None
    found = folder / home_expanded(path)
    if not found.is_dir():
        raise ConfigError(f"{option} {found}: there is no such folder")
    return found


def _names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
