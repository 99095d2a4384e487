"""What was measured so far, in a JSON file: a measurement that is interrupted goes on where it was.

    {"ropewalk": "perplexity", "version": 1, "settings": {"text": ...},
     "parts": {"yarn": {"settings": {"RoPE": ...}, "kept": {"2048 0": ...}}}}

A record is of one kind and one text; its parts are the ways in which the model was run. What the numbers depend on
stands in `settings`, and a file that was made for others is refused. The file is replaced as a whole after every unit
of work, so it holds what was finished, whenever the program ends.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.base.json import Section, read_json_object, shown

VERSION = 1


class Record:
    """Parts by name. path None: nothing is written.

    kind: what is measured; settings: what all parts have in common, plain JSON data.

    Raises:
        RequestError: the file cannot be read or written, is damaged, or was made for another kind or other settings.
    """

    def __init__(self, path: Path | None, kind: str, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._kind = kind
        self._settings = _plain(settings)
        self._parts: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        if path.exists():
            self._read(path)
        else:
            self.write()  # a place that cannot be written to is found out before hours of work

    def part(self, name: str, settings: Mapping[str, Any]) -> Part:
        """The part of that name, empty if there is none yet.

        Raises:
            RequestError: the file has one for other settings.
        """
        wanted = _plain(settings)
        found = self._parts.setdefault(name, {"settings": wanted, "kept": {}})
        difference = _difference(found["settings"], wanted)
        if difference is not None:
            raise RequestError(f"{self.path}: {name}: {difference}; name another file, or remove this one")
        return Part(self, found["kept"])

    def write(self) -> None:
        """Replace the file.

        Raises:
            RequestError: it cannot be written.
        """
        if self.path is None:
            return
        whole = {"ropewalk": self._kind, "version": VERSION, "settings": self._settings, "parts": self._parts}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(whole), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RequestError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def _read(self, path: Path) -> None:
        settings, self._parts = _read_whole(path, self._kind)
        difference = _difference(settings, self._settings)
        if difference is not None:
            raise RequestError(f"{path}: {difference}; name another file, or remove this one")


class Part(MutableMapping[str, Any]):
    """What was found in one way of running the model, by keys of the measurement. Setting a value writes the file."""

    def __init__(self, record: Record, kept: dict[str, Any]) -> None:
        self._record = record
        self._kept = kept

    def __getitem__(self, key: str) -> Any:
        return self._kept[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._kept[key] = _plain(value)
        self._record.write()

    def __delitem__(self, key: str) -> None:
        del self._kept[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


def read_parts(path: Path, kind: str) -> dict[str, dict[str, Any]]:
    """The parts of a record by name, whatever it was made of: each has `settings` and `kept`.

    Raises:
        RequestError: the file cannot be read, is damaged, or is of another kind.
    """
    return _read_whole(path, kind)[1]


def text_facts(token_ids: Sequence[int]) -> dict[str, Any]:
    """What tells one text from another, as a tokenizer cut it."""
    digest = hashlib.sha256(b"".join(int(token).to_bytes(4, "little") for token in token_ids)).hexdigest()
    return {"tokens of the text": len(token_ids), "text": digest[:32]}


def _read_whole(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(settings, parts) of a record."""
    try:
        section = Section(str(path), read_json_object(path))
        found, version = section.text("ropewalk"), section.integer("version", 1, VERSION)
        settings, parts = section.section("settings"), section.section("parts")
        if found is None or settings is None or parts is None:
            raise section.error("parts", "an object, beside ropewalk and settings: this is no record")
        for name in parts.values:
            part = parts.section(name)
            if part is None or part.section("settings") is None or part.section("kept") is None:
                raise parts.error(name, "an object with settings and kept")
    except ConfigError as error:
        raise RequestError(f"{error}: name another file, or remove this one if it is a record") from error
    assert version == VERSION
    if found != kind:
        raise RequestError(f"{path} is a record of {shown(found)}, not of {kind!r}: name another file")
    return dict(settings.values), dict(parts.values)


def _plain(value: Any) -> Any:
    """As it will be read again."""
    return json.loads(json.dumps(value))


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first setting that is not the same, in words."""
    for name in dict.fromkeys([*wanted, *found]):
        if found.get(name) != wanted.get(name):
            return f"{name} was {_brief(found.get(name))} when it was begun, and is {_brief(wanted.get(name))} now"
    return None


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."
