"""The part of a model that rotates keys: its RoPE, and the caches that follow it when it changes."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ropewalk.adapters.request import Request
from ropewalk.adapters.sets import AdapterKey, ModelChange
from ropewalk.base.choices import RESCALE_MODE
from ropewalk.base.errors import RequestError
from ropewalk.base.json import shown
from ropewalk.model.cache import Frequencies, KvCache
from ropewalk.model.rescale import follow_length_, rescale
from ropewalk.model.shift import shift_
from ropewalk.model.step import Cancelled, Checked, Progress
from ropewalk.model.token_ids import TokenIds, checked_token_ids
from ropewalk.rope.given import rope_as_given
from ropewalk.rope.rope import Rope

if TYPE_CHECKING:
    from ropewalk.adapters.sets import AdapterSets
    from ropewalk.config.layer_order import LayerOrder
    from ropewalk.config.model import ModelConfig
    from ropewalk.model.pages import ModelLimits
    from ropewalk.model.store import PageStore


class LiveRope:
    """What `Model` does with its RoPE. caches: all that are in use."""

    config: ModelConfig
    layer_order: LayerOrder
    limits: ModelLimits
    max_seq_len: int
    store: PageStore
    _adapters: AdapterSets

    def __init__(self, rope: Rope, rope_growth: str) -> None:
        self.rope = rope
        self.rope_growth = rope_growth
        self.caches: weakref.WeakSet[KvCache] = weakref.WeakSet()
        self._frequencies: tuple[int, Frequencies] | None = None  # of the last length asked for

    def rescale(
        self,
        rope_scaling: Mapping[str, Any] | str | None = None,
        mode: str = RESCALE_MODE.default,
        caches: Iterable[KvCache] | None = None,
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
        *,
        compress_pos_emb: float | None = None,
        alpha_value: float | None = None,
        rope_theta: float | None = None,
        max_seq_len: int | None = None,
    ) -> bool:
        """Another RoPE from now on, and caches that follow it; False once cancelled: then everything is as it was.

        rope_scaling, compress_pos_emb, alpha_value, rope_theta: as for `load_model`; none of them: as the model's files
            declare.
        mode: "rotate" turns the cached keys by the difference of angles, in a moment: what the layers above the first
            computed under the old RoPE stays. "recompute" computes keys and values anew, beside the old ones: the bits
            of a fresh call, in its time.
        caches: those to be brought along (default: all that are in use). Others stay as they are and are refused until
            they are brought along, too, or emptied. Prefixes that were shared (`share`) belong to the RoPE of then.
        max_seq_len: the longest sequence from now on (default: as before), at most what the memory for pages holds.
            Caches that were made for the limit of before follow it.
        progress: called with (positions done, positions to do). cancelled: asked before anything is written.

        Raises:
            ConfigError, UnsupportedError: as `resolve_rope`; an unknown mode; a max_seq_len that does not fit; mode
                "rotate" where another part of the features is rotated. RequestError: a cache of another model or layer
                order, or longer than max_seq_len; an adapter that is needed again and was unloaded.
            CacheFullError: pages are shared, or computed anew, and there is no memory for them. Everything is as it
                was.
        """
        rope = rope_as_given(
            self.config.raw,
            max_seq_len or self.max_seq_len,
            rope_scaling=rope_scaling,
            compress_pos_emb=compress_pos_emb,
            alpha_value=alpha_value,
            rope_theta=rope_theta,
            source=self.config.source,
        )
        return rescale(self, rope, mode, caches, max_seq_len, progress, cancelled)

    def shift(self, cache: KvCache, keep: int, drop: int) -> int:
        """Take `drop` positions out of a cache, from `keep` on, and move the rest down instead of reading it again.

        Returns how many positions were moved. Their keys are turned to the new positions, up to rounding; but they were
        computed with the dropped tokens in sight, so the cache equals no fresh one, and nothing of it that was moved is
        shared. keep: of a conversation the system prompt, and never less than a few tokens: much attention goes to the
        first ones of a text.

        Raises:
            RequestError: a cache of another model, layer order or RoPE; positions that it does not hold.
            CacheFullError: pages are shared, and there is no memory for others. The cache is as it was.
        """
        self.check_owner(cache)
        return shift_(self, cache, keep, drop)

    def keep(self, cache: KvCache, client: Hashable = None) -> None:
        """Hold on to a cache that nobody uses any more, for `resume`: until the memory is needed.

        Raises:
            RequestError: a cache of another model, layer order or RoPE.
        """
        self.check_owner(cache)
        with self.store.lock:
            self.store.kept.add(cache, client)

    def resume(
        self,
        cache: KvCache,
        token_ids: TokenIds,
        adapters: Request | None = None,
        client: Hashable = None,
        shifts: bool = False,
    ) -> int:
        """Put what a kept cache of the same client holds of `token_ids` in the place of what `cache` does, if it is
        more, by a page at least; returns how many positions were shifted for that.

        shifts: also from a cache of which a stretch has to be taken out. At most len(token_ids) - 1 positions are
        given: the last token must be run for its logits.

        Raises:
            RequestError: as `attach`.
        """
        self.check_owner(cache)
        ids = checked_token_ids(token_ids, self.config.vocab_size)[:-1]
        key = self._adapters.key(adapters)
        with self.store.lock:
            for found in self.store.kept.find(ids, client, shifts, cache.length):
                made = {segment.origin.adapters for *_, segment in found.cache.stretches}
                if self.accepts(found.cache) and made == {key} and found.length <= cache.capacity:
                    break
            else:
                return 0
            self.store.kept.forget(found.cache)
        removed = found.removed
        try:
            found.cache.truncate(removed.keep + removed.drop + removed.rest)
            moved = shift_(self, found.cache, removed.keep, removed.drop)
        except RequestError:  # no memory for it, or the recent positions are not held in float16 any more
            return 0
        cache.become_(found.cache)
        return moved

    def new_cache_like(self, cache: KvCache) -> KvCache:
        """An empty cache of the same capacity, which `caches` does not count: it is to take the other's place."""
        made = KvCache(self, self.store.lock, cache.cache_format, cache.capacity, self.layer_order)
        made.rope = self.rope
        return made

    def change_of(self, key: AdapterKey) -> ModelChange:
        """What the adapters of an origin change, packed for the backend.

        Raises:
            RequestError: one of them has been unloaded.
        """
        return self._adapters.change(key)

    def set_rope_(self, rope: Rope, max_seq_len: int) -> None:
        """For `rescale`, which looks after the caches."""
        self.rope, self.max_seq_len = rope, max_seq_len
        self.limits = replace(self.limits, max_seq_len=max_seq_len)
        self._frequencies = None

    def frequencies(self, seq_len: int) -> Frequencies:
        """The identity of the rotation tables of a call that reaches `seq_len` positions."""
        last = self._frequencies
        if last is not None and (last[0] == seq_len or not self.rope.depends_on_length):
            return last[1]
        inverse_frequencies, attention_scale = self.rope.inverse_frequencies(seq_len)
        found = Frequencies(np.asarray(inverse_frequencies, dtype=np.float64).tobytes(), float(attention_scale))
        self._frequencies = seq_len, found
        return found

    def reach_of(self, reach: int, length: int) -> int:
        """The length whose frequencies a sequence gets that is to have `length` positions. reach: the length that those
        of its keys are for, 0 if it has none."""
        if not reach:
            return length
        return reach if length <= reach else self.rope.grown_length(length)

    def follow_length_(self, spans: Sequence[Checked]) -> None:
        """Bring the caches of a step along that outgrow the length of their frequencies; see model/rescale.py."""
        follow_length_(self, spans)

    def check_owner(self, cache: KvCache) -> None:
        """Raises:
        RequestError: not a cache of this model under its present layer order, or one whose keys another RoPE rotated.
        """
        self.check_maker(cache)
        if not cache.length:
            cache.rope = self.rope
        elif not self.rope.turns_like(cache.rope):
            raise RequestError(
                f"the keys of the cache were rotated by another RoPE ({cache.rope.describe()}) than the model has now "
                f"({self.rope.describe()}): bring it along with rescale(..., caches=[cache]), or truncate it to 0"
            )

    def check_maker(self, cache: KvCache) -> None:
        """Raises:
        RequestError: not a cache of this model under its present layer order.
        """
        if not isinstance(cache, KvCache):
            raise RequestError(f"cache must be made by model.new_cache(), got {type(cache).__name__}")
        if cache.owner is not self:
            raise RequestError("the cache belongs to another model; make one with new_cache() of this model")
        if cache.layer_order != self.layer_order:
            raise RequestError(
                f"the cache was made for the layer order {shown(str(cache.layer_order))}, the model now has "
                f"{shown(str(self.layer_order))}: make another cache with new_cache()"
            )
