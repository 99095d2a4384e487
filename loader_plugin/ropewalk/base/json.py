"""Reading JSON configuration with types: every mistake is a ConfigError naming the file, the key and what is accepted.

`read_json_object` turns a file into a dictionary; a `Section` reads typed values out of one. An explicit `null` counts
as an absent key, as transformers treats it for every key that we read.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ropewalk.base.errors import ConfigError, brief

T = TypeVar("T")

# The largest real one (a quantize_config.json with a rule per module of a large model) is under 1 MiB.
MAX_FILE_BYTES = 64 * 2**20


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a UTF-8 file holds (one byte order mark is skipped).

    Raises:
        ConfigError: unreadable, too large, not UTF-8, not JSON, or JSON that is not an object.
    """
    try:
        value = json.loads(read_small_file(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply for a configuration file") from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is not valid JSON ({brief(error)}): it may be truncated, download it again"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {shown(value)}")
    return value


def require_folder(folder: Path, holding: str, kind: str = "model folder") -> None:
    """Refuse a path that is not a readable folder; `holding` says what the right one holds, `kind` what it is called.

    Raises:
        ConfigError: it is a file, does not exist, cannot exist, or may not be listed and entered.
    """
    advice = f"give the folder that holds {holding}"
    try:
        if folder.is_file():
            raise ConfigError(f"{folder} is a file: {advice}")
        if not folder.is_dir():
            raise ConfigError(f"{kind} {folder} does not exist: {advice}")
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"{kind} {shown(str(folder))} cannot be read: {error.strerror or error}") from error
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ConfigError(f"{kind} {folder} cannot be read: there is no permission to list and enter it")


def read_small_file(path: Path) -> bytes:
    """The bytes of a file of at most MAX_FILE_BYTES. Pipes and devices are refused: reading one may never end.

    Raises:
        ConfigError: unreadable, too large, or not a file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} cannot be read: it is not a regular file, but a directory, a pipe or a device")
        if status.st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: this is not a configuration file")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def shown(value: Any) -> str:
    """A value as messages show it: short, on one line."""
    try:
        text = repr(value)
    except ValueError:
        return "an integer of thousands of digits"  # which Python refuses to write out
    if not isinstance(value, (str, int, float, type(None))):
        text = f"{type(value).__name__} {text}"
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True, slots=True)
class Section:
    """One JSON object, with what messages say about it: the file it came from and the path of keys that leads to it."""

    source: str
    values: Mapping[str, Any]
    path: str = ""

    def name(self, key: str) -> str:
        """The key as messages show it: "rope_scaling.factor"."""
        return f"{self.path}.{key}" if self.path else key

    def error(self, key: str, accepted: str) -> ConfigError:
        """The error for a key whose value (or absence) is not accepted."""
        found = shown(self.values[key]) if self.has(key) else "nothing"
        return ConfigError(f"{self.source}: {self.name(key)} must be {accepted}, found {found}")

    def has(self, key: str) -> bool:
        """True if the key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, low: int, high: int) -> int:
        """A required integer within [low, high]; true and 4.0 are not integers."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, key: str, low: int, high: int, default: T) -> int | T:
        """The integer within [low, high], or the default if the key is absent or null."""
        return self.integer(key, low, high) if self.has(key) else default

    def number(self, key: str, low: float, high: float, *, above: bool = False) -> float:
        """A required finite number within [low, high], or (low, high] where `above`."""
        value = self.values.get(key)
        accepted = f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, accepted)
        # Integers are compared before conversion: one beyond the range of a double would raise OverflowError.
        if (isinstance(value, float) and not math.isfinite(value)) or not low <= value <= high:
            raise self.error(key, accepted)
        if above and value == low:
            raise self.error(key, accepted)
        return float(value)

    def optional_number(self, key: str, low: float, high: float, default: T, *, above: bool = False) -> float | T:
        """The number, or the default if the key is absent or null."""
        return self.number(key, low, high, above=above) if self.has(key) else default

    def boolean(self, key: str, default: bool) -> bool:
        """true or false, or the default if the key is absent or null."""
        if not self.has(key):
            return default
        if not isinstance(self.values[key], bool):
            raise self.error(key, "true or false")
        return self.values[key]

    def text(self, key: str) -> str | None:
        """A string, or None if the key is absent or null."""
        if not self.has(key):
            return None
        if not isinstance(self.values[key], str):
            raise self.error(key, "a string")
        return self.values[key]

    def section(self, key: str) -> Section | None:
        """The object under the key, or None if the key is absent or null."""
        if not self.has(key):
            return None
        if not isinstance(self.values[key], Mapping):
            raise self.error(key, "an object")
        return Section(self.source, self.values[key], self.name(key))
