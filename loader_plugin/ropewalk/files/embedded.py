"""Where the embedded model lies, and how far its context is extended for conversations.

It was trained on 512 tokens, which a conversation soon fills. YaRN with a factor of 4 costs it no quality (see its
card), so the command line, the server, the page and the copy for text-generation-webui all give it 2,048. The commands
that measure it (`perplexity`, `retrieval`, `compare`, `info`) and `load_model` take it as its files declare it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ropewalk.base.errors import CheckpointError

EMBEDDED_METHOD = "yarn"
EMBEDDED_FACTOR = 4.0


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


def embedded_scaling() -> dict[str, Any]:
    """Its RoPE scaling for conversations, as an argument of `load_model`; the context length follows from it."""
    return {"rope_type": EMBEDDED_METHOD, "factor": EMBEDDED_FACTOR}
