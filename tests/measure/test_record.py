"""measure/record.py: what was kept comes back, and a file of another measurement is refused with the difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ropewalk.base.errors import RequestError
from ropewalk.measure.record import Record, text_facts

TEXT = text_facts([1, 2, 3])
FACTS = {"cache": "fp16", "adapters": []}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "record.json"
    Record(path, "perplexity", TEXT).part("yarn", FACTS)["64 0"] = {"sums": [0.1, 1 / 3], "seconds": 2}
    return path


def test_what_was_kept_comes_back_to_the_bit(path: Path) -> None:
    part = Record(path, "perplexity", TEXT).part("yarn", FACTS)
    assert dict(part) == {"64 0": {"sums": [0.1, 1 / 3], "seconds": 2}}
    assert list(path.parent.iterdir()) == [path]  # no temporary file stays


def test_every_unit_is_in_the_file_at_once_and_parts_stay_apart(path: Path) -> None:
    record = Record(path, "perplexity", TEXT)
    record.part("yarn", FACTS)["64 1"] = [1]
    record.part("none", {"cache": "fp32"})["64 0"] = [2]
    parts = json.loads(path.read_text())["parts"]
    assert list(parts["yarn"]["kept"]) == ["64 0", "64 1"] and parts["none"]["kept"] == {"64 0": [2]}


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    part = Record(None, "perplexity", TEXT).part("yarn", FACTS)
    part["a"] = (1, 2)
    assert part["a"] == [1, 2] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("divergence", TEXT, "is a record of 'perplexity', not of 'divergence'"),
        ("perplexity", text_facts([1, 2, 4]), "text was .* when it was begun, and is .* now"),
        ("perplexity", text_facts([1, 2]), "tokens of the text was 3 when it was begun, and is 2 now"),
    ],
)
def test_a_record_of_something_else_is_refused(path: Path, kind: str, settings: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Record(path, kind, settings)


def test_a_part_of_other_settings_is_refused_by_name(path: Path) -> None:
    with pytest.raises(RequestError, match="yarn: cache was fp16 when it was begun, and is q8 now; name another file"):
        Record(path, "perplexity", TEXT).part("yarn", {**FACTS, "cache": "q8"})


def test_a_file_cut_short_anywhere_is_refused(path: Path) -> None:
    whole = path.read_text()
    for length in range(0, len(whole), 7):
        path.write_text(whole[:length])
        with pytest.raises(RequestError, match="name another file, or remove this one"):
            Record(path, "perplexity", TEXT)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"ropewalk": "perplexity"}', '{"ropewalk": 1, "version": 1, "settings": {}, "parts": {}}']
)
def test_other_json_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(RequestError, match=f"{path}.*name another file, or remove this one"):
        Record(path, "perplexity", TEXT)


def test_parts_of_another_shape_are_refused(path: Path) -> None:
    whole = json.loads(path.read_text())
    whole["parts"]["yarn"] = {"settings": {}}
    path.write_text(json.dumps(whole))
    with pytest.raises(RequestError, match="parts.yarn must be an object with settings and kept"):
        Record(path, "perplexity", TEXT)


def test_a_record_of_a_later_version_is_refused(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(RequestError, match="version must be an integer from 1 to 1, found 2"):
        Record(path, "perplexity", TEXT)


def test_a_place_that_cannot_be_written_is_found_out_at_once(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be written"):
        Record(tmp_path / "nowhere" / "record.json", "perplexity", TEXT)
