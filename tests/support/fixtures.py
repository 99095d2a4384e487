"""Where the fixtures lie, and how exactly their logits are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accuracy import FACTOR, Size

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


def container_fixture_folders() -> list[Path]:
    """The checkpoint fixtures in AWQ and compressed-tensors; none where the shared ones are absent."""
    root = SHARED_FIXTURES / "containers"
    return sorted(path.parent for path in root.glob("*/fixture.json"))


def family_fixture_folders() -> list[Path]:
    """The checkpoint fixtures of families beside Llama's; none where the shared ones are absent."""
    root = SHARED_FIXTURES / "families"
    return sorted(path.parent for path in root.glob("*/fixture.json"))


def measured(folder: Path, *names: str) -> Any:
    """How far from float64 plain computations of this checkpoint are, as its maker measured."""
    found = json.loads((folder / "fixture.json").read_text())
    for name in names:
        found = found[name]
    return found


def allowed_error(folder: Path, cache_type: str) -> Size:
    """Between our logits and those of transformers in float32, of which float64 lies as far as measured.

    Ours may be twice as far from it as a plain computation with the same cache is.
    """
    theirs = measured(folder, "hf_fp32_vs_numpy_f64")
    plain = theirs if cache_type == "fp32" else measured(folder, "simulated_error", "kv_cache_fp16")
    return Size(*(FACTOR * plain[name] + theirs[name] for name in ("rms", "max_abs")))
