"""The decoder: token ids in, logits out, keys and values in a cache.

    x = Embed(ids);  x = Layer_i(x) for every layer instance;  logits = RMSNorm(x) Head

A prompt is run in chunks of `max_input_len` tokens, so scratch memory depends on the chunk and never on the context.
The residual stream is float32. Rotation tables are made for the rows of a chunk only; methods whose frequencies depend
on the length take them for the length that the whole call reaches, so chunking never changes a result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ropewalk.adapters.lora import read_adapter
from ropewalk.adapters.low_rank import embed_changed, head_changed
from ropewalk.adapters.request import Request
from ropewalk.adapters.sets import AdapterKey, AdapterSets, ModelChange
from ropewalk.backends.protocol import Backend, PackedLinear
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.base.json import shown
from ropewalk.config.instances import instances_of
from ropewalk.config.layer_order import LayerOrder, choose_layer_order, plain_order
from ropewalk.config.model import ModelConfig
from ropewalk.config.quantisation import QuantConfig
from ropewalk.model.cache import Frequencies, KvCache, Origin, cache_bytes, new_stores
from ropewalk.model.layers import PackedLayer, Rotation, run_layer_
from ropewalk.rope.rope import Rope, resolve_rope

logger = logging.getLogger(__name__)

LOGITS_ROWS = 256  # rows of the head computed at once: 131 MB for a vocabulary of 128,256
LOGITS_MODES = ("last", "all", "none")
INTEGER_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights of a model. embeddings: [V, C] as stored; final_norm: [C] float32; head: C to V.

    layers: those of the model, followed by those of the second model, if any.
    """

    embeddings: torch.Tensor
    layers: tuple[PackedLayer, ...]
    final_norm: torch.Tensor
    head: PackedLinear
    head_is_embeddings: bool

    @property
    def num_bytes(self) -> int:
        """Memory of the weights as the backend holds them; an embedding table that is also the head counts once."""
        embeddings = 0 if self.head_is_embeddings else self.embeddings.numel() * self.embeddings.element_size()
        layers = sum(layer.num_bytes for layer in self.layers)
        return embeddings + layers + 4 * self.final_norm.numel() + self.head.num_bytes


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a model was loaded for: the longest sequence, the chunk size of a prefill, the dtype of keys and values."""

    max_seq_len: int
    max_input_len: int
    cache_type: str


class Model:
    """A decoder ready to run. Made by `load_model`; not safe to call from two threads at once."""

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
        self.rope = rope
        self.backend = backend
        self.weights = weights
        self.max_seq_len = limits.max_seq_len
        self.max_input_len = limits.max_input_len
        self.cache_type = limits.cache_type
        self.layer_order = layer_order or plain_order(config.num_layers)
        self.instances = instances_of(self.layer_order, config.num_layers)
        self._adapters = AdapterSets(config, backend, self.instances)

    def set_layer_order(
        self,
        layer_order: str | Sequence[int] | LayerOrder | None = None,
        recompute_n_layers: int | None = None,
        rewind_n_layers: int | None = None,
    ) -> None:
        """Run these layers from now on; no argument: the order of the model's files. No weight is read or copied.

        Caches belong to the order under which they were made: under another one they are refused.

        Raises:
            ConfigError: as `layer_order.choose_layer_order`. The model is as it was.
        """
        second_layers = len(self.weights.layers) - self.config.num_layers or None
        order = choose_layer_order(self.config, layer_order, recompute_n_layers, rewind_n_layers, second_layers)
        self.instances = instances_of(order, self.config.num_layers)
        self.layer_order = order
        self._adapters.set_instances(self.instances)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights as the backend holds them."""
        return self.weights.num_bytes

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters, in the order of loading."""
        return self._adapters.names

    def load_adapter(self, folder: str | Path, name: str, rope_scaling: Mapping[str, Any] | None = None) -> None:
        """Load a LoRA (a PEFT folder) beside the model, for the requests that name it.

        rope_scaling: the RoPE scaling that the adapter was trained for, as in config.json (default: what its
            adapter_config.json has under this key). One that differs from the model's gives a warning, no more.

        Raises:
            RequestError: the name is taken. CheckpointError: no adapter, a damaged one, or one for another model.
            ConfigError: a setting is wrong. UnsupportedError: a kind of adapter that is not implemented.
            In each case the model and its other adapters stay usable.
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
        """Memory of the keys and values of `length` positions."""
        return cache_bytes(self.config, len(self.instances), length, self.cache_type)

    def new_cache(self, max_seq_len: int | None = None) -> KvCache:
        """An empty cache for at most `max_seq_len` positions (default: what the model was loaded for).

        Raises:
            ConfigError: not a positive integer, more than the model was loaded for, or more than fits into memory.
        """
        capacity = self.max_seq_len if max_seq_len is None else max_seq_len
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise ConfigError(f"max_seq_len must be a positive integer, got {max_seq_len!r}")
        if capacity > self.max_seq_len:
            raise ConfigError(
                f"max_seq_len: a cache of {capacity} positions was asked for, but the model was loaded for "
                f"{self.max_seq_len}; load it with max_seq_len={capacity}"
            )
        stores = new_stores(self.backend, self.config, len(self.instances), capacity, self.cache_type)
        return KvCache(self, stores, capacity, self.layer_order)

    def accepts(self, cache: KvCache) -> bool:
        """True if `cache` was made by this model under its present layer order."""
        return isinstance(cache, KvCache) and cache.owner is self and cache.layer_order == self.layer_order

    def reusable_prefix(
        self,
        cache: KvCache,
        token_ids: Sequence[int] | np.ndarray | torch.Tensor,
        adapters: Request | None = None,
    ) -> int:
        """How many leading positions of `cache` a call with `token_ids` can keep and give the result of a fresh call.

        At most len(token_ids) - 1: the last token must be run for its logits. Positions whose keys were rotated for
        another length (dynamic NTK, longrope), or computed with other adapters, cannot be kept. Truncate the cache to
        the result, then call `forward` with the remaining ids.

        Raises:
            RequestError: as `forward`, except that any number of ids is accepted.
        """
        self._check_owner(cache)
        ids = checked_token_ids(token_ids, self.config.vocab_size)
        return cache.common_prefix(ids[:-1], Origin(self._frequencies(len(ids)), self._adapters.key(adapters)))

    def forward(
        self,
        token_ids: Sequence[int] | np.ndarray | torch.Tensor,
        cache: KvCache,
        logits: str = "last",
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        seq_len: int | None = None,
        adapters: Request | None = None,
    ) -> torch.Tensor | None:
        """Append tokens to the cache and compute logits.

        token_ids: [T] integers, appended at position `cache.length`.
        logits: "last" -> [1, V], "all" -> [T, V], "none" -> None; float32, on the device of the backend.
        progress: called with (tokens done, T) after every layer; a chunk counts in equal parts per layer.
        cancelled: asked before every layer; once it returns True, forward returns None. The cache then holds the
            complete chunks and stays usable.
        seq_len: the length that later calls will reach, if one sequence is passed in several calls: RoPE methods that
            depend on the length then use it from the start (default: the length that this call reaches).
        adapters: loaded adapters with their weights and, if they are not for every layer, their layer instances:
            [("storm", 1.0), ("poet", 0.5, "10-11")] or the text "storm+poet:0.5@10-11" (see adapters/request.py).

        Raises:
            RequestError: ids of a wrong type or out of range, none at all, more than the cache has room for, a cache of
                another model or layer order, an unknown `logits`, adapters that are not loaded. The cache is as it was.
        """
        ids = self._checked_request(token_ids, cache, logits)
        change = self._adapters.change(self._adapters.key(adapters))
        if seq_len is not None and (not isinstance(seq_len, int) or isinstance(seq_len, bool) or seq_len < 1):
            raise RequestError(f"seq_len must be a positive integer or None, got {seq_len!r}")
        end = max(cache.length + len(ids), seq_len or 0)
        origin = Origin(self._frequencies(end), change.key)
        out = self._new_logits(len(ids), logits)
        for first in range(0, len(ids), self.max_input_len):
            chunk = ids[first : first + self.max_input_len]
            steps = _Steps(first, len(chunk), len(ids), len(self.instances), progress, cancelled)
            x = self._run_chunk(chunk, cache, end, steps, change)
            if x is None:
                return None
            cache.record_(chunk, origin)
            self._write_logits_(x, first, len(ids), logits, change, out)
        return out

    def _run_chunk(
        self, ids: list[int], cache: KvCache, seq_len: int, steps: _Steps, change: ModelChange
    ) -> torch.Tensor | None:
        """The residual stream after all layers, [T, C] float32; None once cancelled."""
        start, device = cache.length, self.backend.device
        tables = self.rope.rotation_tables(start, start + len(ids), seq_len)
        rotation = Rotation(*(torch.from_numpy(table).to(device) for table in tables))  # [T, R/2] each
        token_ids = torch.tensor(ids, device=device)
        x = embed_changed(self.backend, self.weights.embeddings, token_ids, change.embeddings)  # [T, C]
        for done, (instance, changed) in enumerate(zip(self.instances, change.instances, strict=True)):
            if steps.is_cancelled():
                return None
            layer, kv = self.weights.layers[instance.weights_index], cache.stores[instance.cache_index]
            run_layer_(x, self.backend, layer, kv, rotation, start, instance.residual_weight, changed)
            steps.report(done + 1)
        return x

    def _new_logits(self, num_tokens: int, logits: str) -> torch.Tensor | None:
        rows = {"last": 1, "all": num_tokens, "none": 0}[logits]
        if not rows:
            return None
        try:
            return torch.empty(rows, self.config.vocab_size, device=self.backend.device)
        except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as a RuntimeError
            raise RequestError(
                f'logits="all" of {rows} tokens takes {4 * rows * self.config.vocab_size} bytes, which could not be '
                f"allocated; call forward with fewer tokens at a time"
            ) from error

    def _write_logits_(
        self,
        x: torch.Tensor,
        first: int,
        num_tokens: int,
        logits: str,
        change: ModelChange,
        out: torch.Tensor | None,
    ) -> None:
        """Logits of the chunk x: [T, C] that starts at token `first` of the call, written to their rows of `out`."""
        if out is None:
            return
        if logits == "last":
            if first + x.shape[0] < num_tokens:
                return
            first, x = 0, x[-1:]
        for row in range(0, x.shape[0], LOGITS_ROWS):
            block = x[row : row + LOGITS_ROWS]  # [rows, C]
            normed = self.backend.rms_norm(block, self.weights.final_norm, self.config.rms_norm_eps)
            rows = slice(first + row, first + row + len(block))
            out[rows] = head_changed(self.backend, normed, self.weights.head, change.head)

    def _frequencies(self, seq_len: int) -> Frequencies:
        inverse_frequencies, attention_scale = self.rope.inverse_frequencies(seq_len)
        return Frequencies(np.asarray(inverse_frequencies, dtype=np.float64).tobytes(), float(attention_scale))

    def _check_owner(self, cache: KvCache) -> None:
        if not isinstance(cache, KvCache):
            raise RequestError(f"cache must be made by model.new_cache(), got {type(cache).__name__}")
        if cache.owner is not self:
            raise RequestError("the cache belongs to another model; make one with new_cache() of this model")
        if not self.accepts(cache):
            raise RequestError(
                f"the cache was made for the layer order {shown(str(cache.layer_order))}, the model now has "
                f"{shown(str(self.layer_order))}: make another cache with new_cache()"
            )

    def _checked_request(self, token_ids: Any, cache: KvCache, logits: str) -> list[int]:
        self._check_owner(cache)
        if logits not in LOGITS_MODES:
            raise RequestError(f"logits must be one of {', '.join(map(repr, LOGITS_MODES))}, got {logits!r}")
        ids = checked_token_ids(token_ids, self.config.vocab_size)
        needed = cache.length + len(ids)
        if needed > cache.capacity:
            raise RequestError(
                f"{len(ids)} tokens do not fit: the cache holds {cache.length} of at most {cache.capacity} positions, "
                f"{needed} are needed; truncate the cache, shorten the input, or load the model with a max_seq_len of "
                f"at least {needed}"
            )
        return ids


def checked_token_ids(token_ids: Any, vocab_size: int) -> list[int]:
    """Token ids as a list of ints, each in 0..vocab_size.

    token_ids: a list, tuple or range of integers, a 1-D integer numpy array or a 1-D integer torch tensor.

    Raises:
        RequestError: of another type or shape, empty, or out of range (names position and id).
    """
    if isinstance(token_ids, (np.ndarray, torch.Tensor)):
        if token_ids.ndim != 1 or str(token_ids.dtype).removeprefix("torch.") not in INTEGER_DTYPES:
            raise RequestError(
                f"token ids must be one-dimensional integers, got {token_ids.dtype} of shape {list(token_ids.shape)}"
            )
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, (list, tuple, range)):
        raise RequestError(
            "token ids must be a list, tuple, 1-D numpy array or 1-D tensor of integers, "
            f"got {type(token_ids).__name__}"
        )
    if not len(token_ids):
        raise RequestError("there are no token ids; at least one is needed")
    for position, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
            raise RequestError(f"token id {token_id!r} at position {position} is not an integer")
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"token id {token_id} at position {position} is out of range: the model knows ids 0 to {vocab_size - 1}"
            )
    return [int(token_id) for token_id in token_ids]


@dataclass(frozen=True, slots=True)
class _Steps:
    """The place of a chunk within its call, for the two callbacks."""

    first: int
    chunk_tokens: int
    total_tokens: int
    num_instances: int
    progress: Callable[[int, int], None] | None
    cancelled: Callable[[], bool] | None

    def is_cancelled(self) -> bool:
        return self.cancelled is not None and self.cancelled()

    def report(self, instances_done: int) -> None:
        if self.progress is not None:
            self.progress(self.first + self.chunk_tokens * instances_done // self.num_instances, self.total_tokens)
