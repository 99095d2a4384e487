"""GPTQ language models at long context, on the machine you have.

    import ropewalk
    model = ropewalk.load_model(folder)
    engine = ropewalk.Engine(model, ropewalk.load_tokenizer(folder))
    for piece in engine.stream("Once upon a time", ropewalk.SamplingParams(max_new_tokens=64)):
        print(piece, end="")

Names are imported when first used: `import ropewalk` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ropewalk import native
    from ropewalk.engine import Engine
    from ropewalk.errors import RopewalkError
    from ropewalk.loader import load_model
    from ropewalk.rope import resolve_rope
    from ropewalk.sampling import SamplingParams
    from ropewalk.tokenizer import load_tokenizer

__version__ = "0.1.0"

_HOME = {
    "Engine": "ropewalk.engine",
    "RopewalkError": "ropewalk.errors",
    "SamplingParams": "ropewalk.sampling",
    "load_model": "ropewalk.loader",
    "load_tokenizer": "ropewalk.tokenizer",
    "resolve_rope": "ropewalk.rope",
}

__all__ = [
    "Engine",
    "RopewalkError",
    "SamplingParams",
    "load_model",
    "load_tokenizer",
    "native",
    "resolve_rope",
]


def __getattr__(name: str) -> Any:
    if name == "native":
        return importlib.import_module("ropewalk.native")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ropewalk' has no attribute {name!r}")
