"""Long caches in every format without reading a long prompt: all pages are copies of one that a prompt has filled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ropewalk
from benchmarking import random_ids
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.config.cache_format import CacheFormat
from ropewalk.model.cache import HeldPage, KvCache, Origin
from ropewalk.model.model import Model
from ropewalk.model.pages import ModelLimits

FORMATS = ("fp16", "q8", "q6", "q4", "q4+256")
FIRST_ID, STRIDE = 300, 7919  # of ids that differ, as llama_cpp/at_depth.cpp has them
CACHE_MEMORY = 16 << 30  # for each format; taken as pages are written


def models_of(folder: Path, formats: Sequence[str], max_seq_len: int, **options: Any) -> dict[str, Model]:
    """One model for each format, all with the same weights."""
    first = ropewalk.load_model(folder, max_seq_len=max_seq_len, backend="cpu", cache_memory=CACHE_MEMORY, **options)
    models = {}
    for name in formats:
        limits = ModelLimits(max_seq_len, first.max_input_len, CacheFormat.parse(name), CACHE_MEMORY)
        models[name] = Model(first.config, first.quant, first.rope, first.backend, first.weights, limits)
    return models


def filled(model: Model, depth: int) -> KvCache:
    """A cache of so many positions, a multiple of a page."""
    ids = random_ids(PAGE_TOKENS, 0, model.config.vocab_size)
    one, cache = model.new_cache(), model.new_cache()
    model.forward(ids, one, "none", seq_len=model.max_seq_len)
    copy = model.store._pool.copy
    pages = [HeldPage(copy(one.pages[0].page), one.pages[0].num_bytes) for _ in range(depth // PAGE_TOKENS)]
    exact = cache.exact_pages(depth, depth)
    cache.hold_(pages, {index: HeldPage(copy(one.recent[0].page), one.recent[0].num_bytes) for index in exact})
    cache.record_(ids * (depth // PAGE_TOKENS), Origin(model.frequencies(model.max_seq_len)), model.max_seq_len)
    return cache


def varied_ids(first: int, count: int, vocab_size: int) -> list[int]:
    """The ids of places first, first + 1, ...: they differ, as those of a text do, and a peer can have the same."""
    return [FIRST_ID + number * STRIDE % (vocab_size - FIRST_ID) for number in range(first, first + count)]
