"""What happened to the cache: KV events for routers, and a short memory of evictions for ``explain``."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from rootcellar.cache.digest import Naming, page_digests
from rootcellar.cache.kind import Kind, Rule, Tier
from rootcellar.cache.node import Node
from rootcellar.cache.shelf import Shelf

MEDIUM = {Tier.DEVICE: "GPU", Tier.HOST: "CPU", Tier.STORAGE: "DISK", Tier.PEER: "EXTERNAL"}
SPEC: dict[Rule, str] = {
    "full": "full_attention",
    "sliding_window": "sliding_window",
    "chunked_local": "chunked_local_attention",
    "recurrent": "mamba",
}
"""What vLLM calls the kinds."""
REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Pages became available on a medium. Fields as vLLM publishes them and in its order, of which SGLang's are a part.

    A block is a page. The order matters: the wire has arrays as well as maps. ``block_hashes`` are the pages' digests
    (32 bytes each), ``parent_block_hash`` that of the page before (None at the start of a key), ``token_ids`` the
    pages' tokens, ``block_size`` tokens in a page. ``extra_keys`` has for each page what it depends on besides tokens:
    the namespace, unless that is empty. ``group_idx`` is the index of the kind whose pages these are,
    ``kv_cache_spec_sliding_window`` its window. No adapter is served: ``lora_id`` and ``lora_name`` are None.
    """

    block_hashes: tuple[bytes, ...]
    parent_block_hash: bytes | None
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None
    extra_keys: tuple[tuple[str, ...] | None, ...]
    group_idx: int
    kv_cache_spec_kind: str
    kv_cache_spec_sliding_window: int | None


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Pages left a medium."""

    block_hashes: tuple[bytes, ...]
    medium: str
    group_idx: int


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Every medium is empty: the cache was flushed."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


def told_kind(kinds: Sequence[Kind]) -> int:
    """The index of the kind whose pages events tell of: the first that is full attention, else the first."""
    return next((k for k, kind in enumerate(kinds) if kind.rule == "full"), 0)


def stored(
    kinds: Sequence[Kind],
    digests: tuple[bytes, ...],
    parent: bytes | None,
    tokens: tuple[int, ...],
    page_size: int,
    tier: Tier,
    namespace: str,
) -> BlockStored:
    """Pages of the told kind came to a tier."""
    index = told_kind(kinds)
    kind = kinds[index]
    return BlockStored(
        block_hashes=digests,
        parent_block_hash=parent,
        token_ids=tokens,
        block_size=page_size,
        lora_id=None,
        medium=MEDIUM[tier],
        lora_name=None,
        extra_keys=((namespace,) if namespace else None,) * len(digests),
        group_idx=index,
        kv_cache_spec_kind=SPEC[kind.rule],
        kv_cache_spec_sliding_window=kind.span if kind.rule == "sliding_window" else None,
    )


def removed(kinds: Sequence[Kind], digests: tuple[bytes, ...], tier: Tier) -> BlockRemoved:
    """Pages of the told kind left a tier."""
    return BlockRemoved(digests, MEDIUM[tier], told_kind(kinds))


class Journal:
    """Writes KV events of one kind as the tree changes."""

    def __init__(self, naming: Naming, kinds: Sequence[Kind]) -> None:
        self._naming = naming
        self._kinds = kinds
        self._told = told_kind(kinds)
        self.events: list[KVEvent] = []

    def came(self, node: Node, shelf: Shelf, lo: int, count: int) -> None:
        """Pages ``[lo, lo + count)`` of a node are on a shelf now."""
        if shelf.kind_index != self._told:
            return
        size = self._naming.page_size
        digests = page_digests(self._naming, node)
        assert node.parent is not None
        if lo:
            above = digests[lo - 1]
        else:
            above = node.parent.digests[-1] if node.start else b""
        root = node
        while root.parent is not None:
            root = root.parent
        tokens = tuple(node.tokens[lo * size : (lo + count) * size].tolist())
        pages = tuple(digests[lo : lo + count])
        self.events.append(stored(self._kinds, pages, above or None, tokens, size, shelf.tier, root.namespace))

    def left(self, node: Node, shelf: Shelf, lo: int, count: int) -> None:
        """Pages ``[lo, lo + count)`` of a node are about to leave a shelf."""
        if shelf.kind_index == self._told:
            digests = page_digests(self._naming, node)
            self.events.append(removed(self._kinds, tuple(digests[lo : lo + count]), shelf.tier))


@dataclass(frozen=True, slots=True)
class Eviction:
    """When an entry was evicted, of which kind, from which tier, and how many tokens.

    ``created`` and ``used``: the ticks at which its node was made and last served that kind.
    """

    tick: int
    kind: str
    tier: Tier
    tokens: int
    created: int
    used: int


class Evictions:
    """The last ``REMEMBERED`` evictions, by the node above and the first page of what went, or by node and kind."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[int, bytes], Eviction] = OrderedDict()
        self._untold: deque[Eviction] = deque(maxlen=REMEMBERED)

    def note(self, where: int, what: bytes, eviction: Eviction) -> None:
        """Remember that below (or in) node ``where`` the page (or kind) ``what`` was evicted."""
        self._untold.append(eviction)
        self._last[where, what] = eviction
        self._last.move_to_end((where, what))
        if len(self._last) > REMEMBERED:
            self._last.popitem(last=False)

    def notes(self) -> list[tuple[int, bytes, Eviction]]:
        """All that is remembered, the oldest first."""
        return [(where, what, eviction) for (where, what), eviction in self._last.items()]

    def find(self, where: int, what: bytes) -> Eviction | None:
        """The last eviction noted there, if it is remembered."""
        return self._last.get((where, what))

    def take(self) -> list[Eviction]:
        """The evictions since the last call, oldest first, the newest ``REMEMBERED`` of them."""
        if not self._untold:
            return []
        untold = list(self._untold)
        self._untold.clear()
        return untold
