"""The decoder: token ids in, logits out, keys and values in caches.

    x = Embed(ids);  x = Layer_i(x) for every layer instance;  logits = Norm(x) Head

model/step.py computes; this module holds what a loaded model consists of, and what can be asked of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ropewalk.adapters.lora import read_adapter
from ropewalk.adapters.request import Request
from ropewalk.adapters.sets import AdapterKey, AdapterSets, ModelChange, SavedUse
from ropewalk.backends.protocol import Backend, PackedLinear
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.base.json import shown
from ropewalk.config.instances import LayerInstance, instances_of
from ropewalk.config.layer_order import LayerOrder, choose_layer_order, plain_order
from ropewalk.config.model import ModelConfig
from ropewalk.config.quantisation import QuantConfig
from ropewalk.model.cache import KvCache, Origin
from ropewalk.model.layers import CopiedLayer, PackedLayer
from ropewalk.model.live_rope import LiveRope
from ropewalk.model.pages import ModelLimits, check_holds_one, choose_cache_memory, context_pages
from ropewalk.model.saved.file import SavedFile
from ropewalk.model.saved.read import fitting_segments, load_cache, usable_prefix
from ropewalk.model.saved.write import save_cache
from ropewalk.model.step import Cancelled, Progress, RunningStep, Span, check_spans, checked_seq_len, run_step
from ropewalk.model.store import PageStore
from ropewalk.model.token_ids import TokenIds, checked_token_ids
from ropewalk.model.work import token_work
from ropewalk.rope.rope import Rope, resolve_rope

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights of a model. embeddings: [V, C] as stored; final_norm: as `read_head` gives it; head: C to V.

    head_bits: as `load_model` was asked for a head that is stored in floats; None for one that is stored in codes.
    layers: those of the model, followed by those of the second model, if any.
    fingerprint, second_fingerprint: of the tensors of either as they were read (see files/fingerprint.py).
    """

    embeddings: torch.Tensor
    layers: tuple[PackedLayer | CopiedLayer, ...]
    final_norm: Mapping[str, torch.Tensor]
    head: PackedLinear
    head_is_embeddings: bool
    head_bits: str | int | None
    fingerprint: str
    second_fingerprint: str | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the weights as the backend holds them; an embedding table that is also the head counts once."""
        embeddings = 0 if self.head_is_embeddings else self.embeddings.numel() * self.embeddings.element_size()
        layers = sum(layer.num_bytes for layer in self.layers)
        final_norm = sum(4 * part.numel() for part in self.final_norm.values())
        return embeddings + layers + final_norm + self.head.num_bytes


class Model(LiveRope):
    """A decoder ready to run. Made by `load_model`.

    One thread at a time may compute (`step`, `forward`); others may share, attach, truncate and drop caches meanwhile.
    work: of a token, in the layers as they are run now.
    """

    def __init__(
        self,
        config: ModelConfig,
        quant: QuantConfig | None,
        rope: Rope,
        backend: Backend,
        weights: ModelWeights,
        limits: ModelLimits,
        layer_order: LayerOrder | None = None,
    ) -> None:
        self.config = config
        self.quant = quant
        super().__init__(rope, limits.rope_growth)
        self.backend = backend
        self.weights = weights
        self.limits = limits
        self.max_seq_len = limits.max_seq_len
        self.max_input_len = limits.max_input_len
        self.cache_format = limits.cache_format
        self.layer_order = layer_order or plain_order(config.num_layers)
        self.instances = instances_of(self.layer_order, config.num_layers)
        self._check_places(self.instances)
        self.work = token_work(config, self.instances)
        self._adapters = AdapterSets(config, backend, self.instances)
        context = context_pages(backend, config, len(self.instances), limits)
        memory = choose_cache_memory(context, limits.cache_memory, backend)
        pool = backend.new_pool(config.num_kv_heads, config.head_dim, limits.cache_format, memory)
        self.store = PageStore(pool, self.cache_format, len(self.instances), limits.chunk_rows)

    def set_layer_order(
        self,
        layer_order: str | Sequence[int] | LayerOrder | None = None,
        recompute_n_layers: int | None = None,
        rewind_n_layers: int | None = None,
    ) -> None:
        """Run these layers from now on; no argument: the order of the model's files. No weight is read or copied.

        Caches belong to the order under which they were made: under another one they are refused.

        Raises:
            ConfigError: as `layer_order.choose_layer_order`; or one context of the order is more than `cache_memory`.
                The model is as it was.
        """
        second_layers = len(self.weights.layers) - self.config.num_layers or None
        order = choose_layer_order(self.config, layer_order, recompute_n_layers, rewind_n_layers, second_layers)
        instances = instances_of(order, self.config.num_layers)
        self._check_places(instances)
        check_holds_one(context_pages(self.backend, self.config, len(instances), self.limits), self.cache_memory)
        self.instances = instances
        self.work = token_work(self.config, instances)
        self.layer_order = order
        self._adapters.set_instances(self.instances)
        self.store.num_instances = len(self.instances)

    def _check_places(self, instances: Sequence[LayerInstance]) -> None:
        layers = self.weights.layers
        self.backend.check_instances([layers[instance.weights_index].compiled for instance in instances])

    @property
    def rotations(self) -> tuple[int | None, ...]:
        """Which table the keys of each layer instance are rotated by: see `Backend.move_rows_`."""
        rotations = self.config.rotations
        return tuple(rotations[instance.weights_index % len(rotations)] for instance in self.instances)

    @property
    def cache_type(self) -> str:
        """The format of keys and values as `load_model` spells it."""
        return str(self.cache_format)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights as the backend holds them."""
        return self.weights.num_bytes + self.backend.bytes_elsewhere

    def close(self) -> None:
        """End the processes that run layers for it, if there are any (`pipeline` of `load_model`); nothing can be
        computed then. A model in one process has none, and goes on. It happens by itself when the model goes, or the
        program ends."""
        self.backend.close()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters, in the order of loading."""
        return self._adapters.names

    def load_adapter(self, folder: str | Path, name: str, rope_scaling: Mapping[str, Any] | None = None) -> None:
        """Load a LoRA (a PEFT folder) beside the model, for the requests that name it.

        rope_scaling: the RoPE scaling that the adapter was trained for, as in config.json (default: what its
            adapter_config.json has under this key). One that differs from the model's gives a warning, no more.

        Raises:
            RequestError: the name is taken. CheckpointError: no adapter in it, a damaged one, or one for another model.
            ConfigError: no such folder, or a setting is wrong. UnsupportedError: a kind of adapter that is not
            implemented. In each case the model and its other adapters stay usable.
        """
        self._adapters.check_new_name(name)
        if not isinstance(folder, (str, Path)):
            raise ConfigError(f"the adapter folder must be a path, got {type(folder).__name__}")
        adapter = read_adapter(Path(folder), self.config, self.weights.embeddings)
        trained_for = adapter.rope_scaling if rope_scaling is None else rope_scaling
        if trained_for is not None:
            self._compare_rope(name, adapter.source, trained_for)
        self._adapters.add(name, adapter)

    def adapter_key(self, adapters: Request | None) -> AdapterKey:
        """The identity of a weighted set of loaded adapters: equal keys give equal results.

        Raises:
            RequestError: not a set of adapters, or a name that is not loaded.
        """
        return self._adapters.key(adapters)

    def adapter_change(self, adapters: Request | None) -> ModelChange:
        """What a weighted set of loaded adapters changes, packed for the backend.

        Raises:
            RequestError: as `adapter_key`.
        """
        return self._adapters.change(self._adapters.key(adapters))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. What it computed stays in caches but is not used again.

        Raises:
            RequestError: no adapter of that name is loaded.
        """
        self._adapters.remove(name)

    def _compare_rope(self, name: str, source: str, rope_scaling: Mapping[str, Any]) -> None:
        wanted = resolve_rope(self.config.raw, rope_scaling=rope_scaling, source=source)
        ours, theirs = (rope.inverse_frequencies(self.max_seq_len) for rope in (self.rope, wanted))
        if not np.allclose(ours[0], theirs[0], rtol=1e-6, atol=0) or ours[1] != theirs[1]:
            logger.warning(
                "adapter %r (%s) was made for another RoPE than the model was loaded with, and text may get worse. "
                "The adapter: %s. The model: %s. Load the model with rope_scaling=%s",
                name,
                source,
                wanted.describe(),
                self.rope.describe(),
                dict(rope_scaling),
            )

    def cache_bytes(self, length: int) -> int:
        """Memory of the keys and values of `length` positions, in whole pages, with a recent window if there is one.

        Raises:
            ConfigError: not an integer from 0 on.
        """
        if not isinstance(length, int) or isinstance(length, bool) or length < 0:
            raise ConfigError(f"length must be a number of positions, from 0 on, got {shown(length)}")
        return self.store.bytes_of(length)

    @property
    def cache_memory(self) -> int:
        """The limit of all pages of keys and values together, in bytes."""
        return self.store.num_bytes

    @property
    def cache_used(self) -> int:
        """Memory of the pages in use, by caches or for prefixes that are shared."""
        return self.store.used_bytes

    @property
    def cache_shared(self) -> int:
        """Memory of the pages that no cache holds: they are kept for prompts that begin alike, until it is needed."""
        return self.store.shared_bytes

    def new_cache(self, max_seq_len: int | None = None) -> KvCache:
        """An empty cache for at most `max_seq_len` positions (default: what the model was loaded for).

        It takes pages as it grows, and gives them back when it is truncated or dropped.

        Raises:
            ConfigError: not a positive integer, or more than the model was loaded for.
        """
        capacity = self.max_seq_len if max_seq_len is None else max_seq_len
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise ConfigError(f"max_seq_len must be a positive integer, got {max_seq_len!r}")
        if capacity > self.max_seq_len:
            raise ConfigError(
                f"max_seq_len: a cache of {capacity} positions was asked for, but the model was loaded for "
                f"{self.max_seq_len}; load it with max_seq_len={capacity}"
            )
        cache = KvCache(self, self.store.lock, self.cache_format, capacity, self.layer_order)
        cache.rope = self.rope
        with self.store.lock:
            self.caches.add(cache)
        return cache

    def fork(self, cache: KvCache) -> KvCache:
        """Another cache with the same positions. It holds the same pages: whoever writes to one takes a copy first.

        Raises:
            RequestError: a cache of another model or layer order.
        """
        self.check_owner(cache)
        with self.store.lock:
            made = cache.fork()
            self.caches.add(made)
        return made

    def accepts(self, cache: KvCache) -> bool:
        """True if `cache` was made by this model, under its present layer order and with its present RoPE."""
        made = isinstance(cache, KvCache) and cache.owner is self and cache.layer_order == self.layer_order
        return made and (not cache.length or self.rope.turns_like(cache.rope))

    def reusable_prefix(self, cache: KvCache, token_ids: TokenIds, adapters: Request | None = None) -> int:
        """How many leading positions of `cache` a call with `token_ids` can keep and give the result of a fresh call.

        At most len(token_ids) - 1: the last token must be run for its logits. Positions whose keys were rotated for
        another length (dynamic NTK, longrope), or computed with other adapters, cannot be kept. Truncate the cache to
        the result, then call `forward` with the remaining ids.

        Raises:
            RequestError: as `forward`, except that any number of ids is accepted.
        """
        self.check_owner(cache)
        ids = checked_token_ids(token_ids, self.config.vocab_size)
        origin = Origin(self.frequencies(len(ids)), self._adapters.key(adapters))
        return cache.continuable(cache.common_prefix(ids[:-1], origin))

    def share(self, cache: KvCache) -> None:
        """Keep what `cache` holds, for `attach`: until the memory is needed, even if the cache is dropped.

        A cache that was computed in several ways (adapters, frequencies) is kept up to the first change.

        Raises:
            RequestError: a cache of another model or layer order.
        """
        self.check_owner(cache)
        self.store.share(cache)

    def attach(
        self, cache: KvCache, token_ids: TokenIds, adapters: Request | None = None, seq_len: int | None = None
    ) -> int:
        """Extend `cache`, which holds a prefix of `token_ids`, by what was shared of the rest; returns its length.

        At most len(token_ids) - 1: the last token must be run for its logits. adapters, seq_len: those of the calls
        that are to follow (see `Span`; default: the length of `token_ids`): only what was computed in the same way is
        used, so what follows has the bits of a fresh call. A cache computed in another way stays as it is.

        Raises:
            RequestError: as `forward`; or the cache holds other tokens.
        """
        self.check_owner(cache)
        ids = checked_token_ids(token_ids, self.config.vocab_size)
        if cache.token_ids != ids[: cache.length]:
            raise RequestError(
                f"the cache holds {cache.length} tokens that are not the first of the {len(ids)} given: truncate it to "
                "what reusable_prefix says"
            )
        length = max(len(ids), checked_seq_len(seq_len) or 0)
        origin = Origin(self.frequencies(length), self._adapters.key(adapters))
        if cache.same_origin(origin) == cache.length:
            self.store.attach(cache, ids[: min(len(ids) - 1, cache.capacity)], origin, length)
        return cache.length

    def save_cache(
        self,
        cache: KvCache,
        path: str | Path,
        progress: Progress | None = None,
        about: Mapping[str, str] | None = None,
    ) -> int:
        """Write what `cache` holds to a file, for `load_cache`; returns the size. The file appears whole or not at all.

        progress: called with (parts of pages done, parts of pages). about: texts to be kept with it.

        Raises:
            RequestError: an empty cache, or one of another model or layer order. SavedCacheError: it cannot be written.
        """
        return save_cache(self, cache, path, progress, about)

    def load_cache(self, path: str | Path, progress: Progress | None = None) -> KvCache:
        """The cache that a file holds; what follows has the bits that would follow the one that was saved.

        Everything is checked before a page is taken. progress: called with (steps done, steps in all).

        Raises:
            SavedCacheError: cut short, damaged, or saved with another model, RoPE, layer order, adapters, arithmetic,
                cache type or version: the message names the file, what was found and what is accepted.
            CacheFullError: there is no room for its pages.
        """
        return load_cache(self, path, progress)

    def saved_uses(self, key: AdapterKey) -> tuple[SavedUse, ...]:
        """A set of adapters by their content, for a file.

        Raises:
            RequestError: one of them has been unloaded.
        """
        return self._adapters.saved_uses(key)

    def key_of_saved(self, uses: Sequence[SavedUse]) -> AdapterKey:
        """The key of a set that a file names.

        Raises:
            RequestError: one of them is not loaded, or they were loaded in another order.
        """
        return self._adapters.key_of_saved(uses)

    def shared_length(self, token_ids: TokenIds, adapters: Request | None = None) -> int:
        """How many leading positions `attach` would give an empty cache for this prompt, at most.

        Raises:
            RequestError: as `forward`.
        """
        ids = checked_token_ids(token_ids, self.config.vocab_size)
        origin = Origin(self.frequencies(len(ids)), self._adapters.key(adapters))
        return self.store.shared_length(self.new_cache(), ids, origin)

    def check_saved(self, file: SavedFile) -> None:
        """Raises:
        SavedCacheError: the file belongs to another model, or other settings of it.
        """
        fitting_segments(self, file)

    def usable_prefix(self, file: SavedFile, token_ids: TokenIds, adapters: Request | None = None) -> int:
        """How many leading positions `attach` would give this prompt once the saved cache is loaded and shared.

        Raises:
            SavedCacheError: the file belongs to another model, or other settings of it. RequestError: as `forward`.
        """
        ids = checked_token_ids(token_ids, self.config.vocab_size)
        origin = Origin(self.frequencies(len(ids)), self._adapters.key(adapters))
        return usable_prefix(self, file, ids, origin)

    def missing_bytes(self, spans: Sequence[Span]) -> int:
        """How much memory for pages these spans lack, even if prefixes that no cache holds are forgotten; 0 if none.
        What else `step` may refuse is not looked at.

        Raises:
            RequestError: not spans, or a cache of another model or layer order.
        """
        for span in spans:
            if not isinstance(span, Span):
                raise RequestError(f"a step takes ropewalk.Span, got {type(span).__name__}")
            self.check_owner(span.cache)
        return self.store.missing_bytes([(span.cache, span.cache.length + len(span.token_ids)) for span in spans])

    def forward(
        self,
        token_ids: TokenIds,
        cache: KvCache,
        logits: str = "last",
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
        seq_len: int | None = None,
        adapters: Request | None = None,
    ) -> torch.Tensor | None:
        """Append tokens to the cache and compute logits: a step with one span.

        token_ids, cache, logits, seq_len, adapters: see `Span`. progress, cancelled: see `step`.

        Raises:
            RequestError, CacheFullError: as `step`. The cache is as it was.
        """
        span = Span(token_ids, cache, logits, adapters, seq_len)
        results = run_step(self, [span], progress, cancelled, named=False)
        return None if results is None else results[0]

    def step(
        self, spans: Sequence[Span], progress: Progress | None = None, cancelled: Cancelled | None = None
    ) -> list[torch.Tensor | None] | None:
        """Append the tokens of every span to its cache; the logits of each, in the order of the spans.

        Each result has the bits that `forward` would give that span alone ("reference": up to rounding).

        progress: called with (rows done, rows of all spans) after every layer; a chunk counts in equal parts per layer.
        cancelled: asked before every layer; once it returns True, step returns None. The caches then hold the complete
            chunks and stay usable.

        Raises:
            RequestError: ids of a wrong type or out of range, none at all, more than a cache has room for, a cache of
                another model or layer order, the same cache twice, an unknown `logits`, adapters that are not loaded.
            CacheFullError: all spans together need more pages than there are. The message names the span, counted from
                0; all caches are as they were.
        """
        return run_step(self, spans, progress, cancelled)

    def begin_step(self, spans: Sequence[Span]) -> RunningStep:
        """As `step`, up to where other processes compute: `finish_` of what it returns gives the results.

        Up to `steps_under_way` steps may be begun before the first is finished, each for other caches. They are
        finished in the order in which they were begun.

        Raises:
            RequestError, CacheFullError: as `step`.
        """
        running = RunningStep(self, check_spans(self, spans, named=True), None, None)
        running.begin_(named=True)
        return running

    @property
    def steps_under_way(self) -> int:
        """How many steps keep all that computes busy: 1 but for a pipeline."""
        return self.backend.steps_under_way
