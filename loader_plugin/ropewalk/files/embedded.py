"""Where the embedded model lies, and how far its context is extended for conversations.

It was trained on 512 tokens, which a document or a conversation soon fills. With the LoRA `yarn-8` it reads
eight times as many under the scaling that this was trained for, so the command line, the server, the page and the copy
for text-generation-webui all use both, unless somebody chooses a scaling or adapters. The commands that measure it
(`perplexity`, `retrieval`, `compare`, `info`) and `load_model` take it as its files declare it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.base.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class EmbeddedContext:
    """A RoPE scaling by method and factor, and the name of the LoRA that was trained for it."""

    method: str
    factor: float
    adapter: str

    @property
    def scaling(self) -> dict[str, Any]:
        """As an argument of `load_model`; the context length follows from it."""
        return {"rope_type": self.method, "factor": self.factor}


EMBEDDED_CONTEXT = EmbeddedContext("yarn", 8.0, "yarn-8")


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


def embedded_adapter() -> Path:
    """The folder of the LoRA that conversations with the embedded model use."""
    return demo_model_path() / "adapters" / EMBEDDED_CONTEXT.adapter
