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
    from ropewalk.base.errors import RopewalkError
    from ropewalk.engine.engine import Engine
    from ropewalk.generate.sampling import SamplingParams
    from ropewalk.model.loader import load_model
    from ropewalk.model.options import LoadOptions
    from ropewalk.model.step import Span
    from ropewalk.rope.rope import resolve_rope
    from ropewalk.text.tokenizer.load import load_tokenizer

__version__ = "0.1.0"

_HOME = {
    "Engine": "ropewalk.engine.engine",
    "LoadOptions": "ropewalk.model.options",
    "RopewalkError": "ropewalk.base.errors",
    "SamplingParams": "ropewalk.generate.sampling",
    "Span": "ropewalk.model.step",
    "load_model": "ropewalk.model.loader",
    "load_tokenizer": "ropewalk.text.tokenizer.load",
    "resolve_rope": "ropewalk.rope.rope",
}

__all__ = [
    "Engine",
    "LoadOptions",
    "RopewalkError",
    "SamplingParams",
    "Span",
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
