"""Run a model once in every way that has kernels of its own: what is compiled at first use is compiled then.

Triton compiles a kernel when it is first launched, and keeps it on disk for every later start.
"""

from __future__ import annotations

from collections.abc import Callable

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
    return done
