"""Where the fixtures lie."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_FIXTURES = REPOSITORY.parent / "shared" / "fixtures"
LOCAL_DATA = REPOSITORY / "tests" / "data"


def gptq_fixture_folders() -> list[Path]:
    """All checkpoint fixtures on this machine: the shared ones and the small copies in tests/data, by unique name."""
    folders = {}
    for root in (LOCAL_DATA / "gptq", SHARED_FIXTURES / "gptq"):
        if root.is_dir():
            folders.update({f.name: f for f in sorted(root.iterdir()) if (f / "fixture.json").is_file()})
    return list(folders.values())


def fixture_folder(kind: str) -> Path:
    """The shared folder `kind` ("gptq" or "rope"), or a skip that says what is missing."""
    for root in (SHARED_FIXTURES, LOCAL_DATA):
        if (root / kind).is_dir():
            return root / kind
    pytest.skip(f"no {kind} fixtures: neither ../shared/fixtures/{kind} nor tests/data/{kind} exists")
