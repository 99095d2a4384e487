"""Where the embedded model lies."""

from __future__ import annotations

from pathlib import Path

from ropewalk.base.errors import CheckpointError


def demo_model_path() -> Path:
    """The folder of the small model that comes with the package.

    Raises:
        CheckpointError: this installation does not have it.
    """
    folder = Path(__file__).resolve().parents[1] / "demo_model"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the embedded model is missing from {folder}: install the package from a full clone, or name a model "
            "folder"
        )
    return folder
