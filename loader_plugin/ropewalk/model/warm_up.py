"""Run a model once in every way that has kernels of its own: what is compiled at first use is compiled then.

Formats of keys and values have kernels of their own: warm up with the cache_type that the model will be loaded with.

Triton compiles a kernel when it is first launched, and keeps it on disk for every later start.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ropewalk.model.model import Model
from ropewalk.model.step import Span

PROMPTS = (1, 2, 17, 33, 65)  # rows at once: each beyond the sizes of the tiles before (backends/gpu/tiles.py)
LONG = 520  # more than the keys that one program attends to (backends/gpu/attention.py)
TOKEN = 0  # any will do


def warm_up(model: Model, progress: Callable[[int, int], None] | None = None) -> int:
    """Steps of few and of many tokens, short contexts and long ones, one sequence and several. Returns their number.

    progress: called with (steps done, steps in all).
    """
    prompts = [rows for rows in PROMPTS if rows <= model.max_seq_len]
    long = min(LONG, model.max_seq_len - 3)
    total, done = len(prompts) + 5, 0

    def step(*spans: Span) -> None:
        nonlocal done
        model.step(list(spans))
        done += 1
        if progress is not None:
            progress(done, total)

    for rows in prompts:
        step(Span([TOKEN] * rows, model.new_cache()))
    first, second = model.new_cache(), model.new_cache()
    step(Span([TOKEN] * max(long, 1), first))
    step(Span([TOKEN], second))
    for _ in range(2):  # the second of a kind is captured where there are graphs
        step(Span([TOKEN], first))
    step(Span([TOKEN], first), Span([TOKEN], second))
    _move_row(model)
    return done


def _move_row(model: Model) -> None:
    """A row of a page onto itself, in both kinds of pages: what re-scaling and shifting a cache launch."""
    cos, sin = model.rope.tables_at(np.zeros(1, np.int64), 1)  # [1, R/2] each
    tables = [torch.from_numpy(table)[None].to(model.backend.device) for table in (cos, sin)]
    pool = model.backend.new_pool(model.config.num_kv_heads, model.config.head_dim, model.cache_format, 1 << 40)
    for recent in (False, True) if model.cache_format.recent else (False,):
        pages = [pool.take(len(model.instances), recent)]
        model.backend.move_rows_(pages, 0, pages, 0, 1, *tables, model.rotations)
