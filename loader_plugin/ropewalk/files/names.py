"""What a person means by a model: a folder, or a name such as TheBloke/Llama-2-7B-GPTQ:gptq-4bit-32g-actorder_True.

A path that exists always wins. A name is OWNER/MODEL with an optional :REVISION (a branch, a tag or a commit), written
without ".", "~" or a drive in front, and no folder OWNER lies here: then it would be a misspelt path. What a name
stands for is downloaded once (files/local.py, files/hub.py) and lies in the cache that all programs of the hub share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
NAME = re.compile(rf"({PART}/{PART})(?::([A-Za-z0-9][A-Za-z0-9._/-]{{0,250}}))?")
FILE_ENDINGS = (".safetensors", ".gguf", ".json", ".bin", ".pt", ".pth")
# In the shared cache a model is models--OWNER--MODEL/snapshots/COMMIT.
CACHED = re.compile(r"models--(.+)--(.+)")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model on the hub; revision None: its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}:{self.revision}"


def parse_name(text: str) -> ModelName | None:
    """The model that a text names; None if it is a path."""
    found = NAME.fullmatch(text)
    if found is None or ".." in text or text.lower().endswith(FILE_ENDINGS):
        return None
    try:
        if Path(text).exists() or Path(text.partition("/")[0]).is_dir():
            return None
    except OSError:
        return None
    return ModelName(found[1], found[2])


def cached_model(folder: Path) -> Path | None:
    """The models--OWNER--MODEL folder that a model folder of the shared cache is in; None for other folders."""
    parents = folder.resolve().parents
    if len(parents) > 1 and parents[0].name == "snapshots" and CACHED.fullmatch(parents[1].name):
        return parents[1]
    return None


def shown_name(folder: Path) -> str:
    """What a model folder is called: by its own name, or by that of the model where it lies in the shared cache."""
    cached = cached_model(folder)
    return folder.resolve().name if cached is None else CACHED.fullmatch(cached.name)[2]
