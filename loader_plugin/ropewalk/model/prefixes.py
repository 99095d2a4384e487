"""Prefixes that have been computed already: a tree of token ids whose nodes hold pages of keys and values.

    root of (layer order, origin) -- 64 ids, page -- 64 ids, page -- 23 ids, page
                                               \\- 64 ids, page

A node is one page: its ids follow those of its parent. A page that is not full is a leaf, and a copy of the tree's own.
Nothing in the tree is ever written. What has not been used for the longest time is forgotten when memory is needed,
leaves first, so that every node has its whole prefix above it.

Its methods are called under the lock of the store (model/store.py).
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Iterator, Sequence

from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.config.layer_order import LayerOrder
from ropewalk.model.cache import KEPT_BACK, HeldPage, KvCache, Origin, common_length

TokenIds = tuple[int, ...]


class Node:
    """A page of the tree. token_ids: of its positions. used: when it was last of use, as counted by the tree.

    recent: the same page in float16, where a sequence ended that had it.

    A parent is held weakly: a tree that is dropped gives its pages back at once, without the cycle collector.
    """

    __slots__ = ("__weakref__", "_parent", "children", "held", "recent", "token_ids", "used")

    def __init__(self, parent: Node | None, token_ids: TokenIds, held: HeldPage | None) -> None:
        self._parent = None if parent is None else weakref.ref(parent)
        self.token_ids = token_ids
        self.held = held  # None: a root
        self.recent: HeldPage | None = None
        self.children: dict[TokenIds, Node] = {}
        self.used = 0

    @property
    def parent(self) -> Node | None:
        """The node of the page before; None of a root."""
        return None if self._parent is None else self._parent()

    @property
    def idle_bytes(self) -> int:
        """Memory that is free once the tree forgets this page: none while a cache holds it too."""
        return sum(held.num_bytes for held in self.all_held if not held.caches)

    @property
    def all_held(self) -> tuple[HeldPage, ...]:
        """The pages of both kinds."""
        return tuple(held for held in (self.held, self.recent) if held is not None)

    def let_go_(self) -> None:
        """The tree holds its pages no more."""
        for held in self.all_held:
            held.in_tree = False


class PrefixTree:
    """The tree, with a root for each layer order and origin."""

    def __init__(self) -> None:
        self._roots: dict[tuple[LayerOrder | None, Origin], Node] = {}
        self._clock = 0

    @property
    def idle_bytes(self) -> int:
        """Memory of the pages that only the tree holds."""
        return sum(node.idle_bytes for node in self._nodes())

    @property
    def moment(self) -> int:
        """When the tree was last asked for something; what was of use then is not older."""
        return self._clock

    def _now(self) -> int:
        self._clock += 1
        return self._clock

    def find(self, order: LayerOrder | None, origin: Origin, token_ids: Sequence[int]) -> list[tuple[Node, int]]:
        """The nodes that hold leading positions of `token_ids`, with the number of positions that agree in each.

        All agree in full except the last, which may agree in some.
        """
        node, found, moment = self._roots.get((order, origin)), [], self._now()
        for first in range(0, len(token_ids), PAGE_TOKENS):
            wanted = tuple(token_ids[first : first + PAGE_TOKENS])
            node, agreeing = _closest(node, wanted) if node is not None else (None, 0)
            if node is None:
                break
            node.used = moment
            found.append((node, agreeing))
            if agreeing < PAGE_TOKENS:
                break
        return found

    def add(self, cache: KvCache, length: int, copied: Callable[[HeldPage], HeldPage | None]) -> None:
        """Keep the first `length` positions of `cache`, which are all of the origin of the first.

        copied: gives a copy of a page that is not full, or None where there is no memory for one.
        """
        token_ids, moment = cache.token_ids[:length], self._now()
        key = (cache.layer_order, cache.first_segment.origin)
        recent = _recent_until(cache, length)
        node = root = self._roots.get(key) or Node(None, (), None)
        for index, held in enumerate(cache.pages):
            wanted = tuple(token_ids[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS])
            if not wanted:
                break
            child, agreeing = _closest(node, wanted)
            if child is None or agreeing < len(wanted):
                kept = held if len(wanted) == PAGE_TOKENS and not held.in_tree else copied(held)
                if kept is None:
                    break
                child = _grow(node, wanted, kept)
            if child.recent is None and index in recent:
                _add_recent(child, cache.recent[index], copied)
            child.used = moment
            node = child
        if root.children:
            self._roots[key] = root

    def forget(self, held: HeldPage) -> None:
        """Forget a page and all that follows it."""
        for node in self._nodes():
            if node.held is held:
                for below in (node, *_below(node)):
                    below.let_go_()
                del node.parent.children[node.token_ids]
                return

    def evict(self, num_bytes: int, before: int | None = None) -> int:
        """Forget leaves, least recently used first, until so much is free or nothing idle is left; returns how much.

        before: only what was last used before this moment.
        """
        freed = 0
        leaves = [(self._order_of(node), id(node), node) for node in self._nodes() if not node.children]
        heapq.heapify(leaves)
        idle = self.idle_bytes
        while leaves and freed < min(num_bytes, idle):
            _, _, node = heapq.heappop(leaves)
            if before is not None and node.used >= before:
                continue
            freed += node.idle_bytes
            parent = node.parent
            del parent.children[node.token_ids]
            node.let_go_()
            if not parent.children and parent.held is not None:
                heapq.heappush(leaves, (self._order_of(parent), id(parent), parent))
        self._roots = {key: root for key, root in self._roots.items() if root.children}
        return freed

    @staticmethod
    def _order_of(node: Node) -> tuple[bool, int]:
        """Pages that a cache holds too come last: forgetting them frees nothing by itself."""
        return node.idle_bytes == 0, node.used

    def _nodes(self) -> Iterator[Node]:
        for root in self._roots.values():
            yield from _below(root)


def _below(node: Node) -> Iterator[Node]:
    waiting = list(node.children.values())
    while waiting:
        found = waiting.pop()
        yield found
        waiting.extend(found.children.values())


def _closest(node: Node, wanted: TokenIds) -> tuple[Node | None, int]:
    """The child that agrees with the most leading ids, and their number; None if none agrees in the first."""
    exact = node.children.get(wanted)
    if exact is not None:
        return exact, len(wanted)
    agreeing, best = max(
        ((common_length(ids, wanted), child) for ids, child in node.children.items()),
        key=lambda pair: pair[0],
        default=(0, None),
    )
    return (best, agreeing) if agreeing else (None, 0)


def _grow(node: Node, token_ids: TokenIds, held: HeldPage) -> Node:
    """A new child; a leaf that holds no more than a part of it goes."""
    for ids in [ids for ids in node.children if len(ids) < len(token_ids) and token_ids[: len(ids)] == ids]:
        node.children.pop(ids).let_go_()
    child = node.children[token_ids] = Node(node, token_ids, held)
    held.in_tree = True
    return child


def _recent_until(cache: KvCache, length: int) -> set[int]:
    """The pages in float16 to keep for a prefix of this length, and for one that leaves it a few tokens before its end:
    a conversation's next prompt often writes the last tokens of a reply in another way."""
    needed, useful = (cache.exact_pages(max(0, start), length) for start in (length, length - KEPT_BACK))
    return {index for index in useful if index in cache.recent} if cache.recent.keys() >= set(needed) else set()


def _add_recent(node: Node, held: HeldPage, copied: Callable[[HeldPage], HeldPage | None]) -> None:
    """Keep a page in float16 beside the node's own; a copy if somebody goes on writing to it."""
    kept = held if len(node.token_ids) == PAGE_TOKENS and not held.in_tree else copied(held)
    if kept is not None:
        node.recent, kept.in_tree = kept, True
