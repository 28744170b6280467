"""What happened to the cache: KV events for routers, and a short memory of evictions for ``explain``."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from rootcellar.cache.digest import Naming, page_digests
from rootcellar.cache.kind import Tier
from rootcellar.cache.node import Node
from rootcellar.cache.shelf import Shelf

MEDIUM = {Tier.DEVICE: "GPU", Tier.HOST: "CPU", Tier.STORAGE: "DISK", Tier.PEER: "EXTERNAL"}
REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Pages became available on a medium. Fields as SGLang and vLLM publish them; a block is a page.

    ``block_hashes`` are the pages' digests (32 bytes each), ``parent_block_hash`` that of the page before (None at the
    start of a key), ``token_ids`` the pages' tokens, ``block_size`` tokens in a page.
    """

    block_hashes: tuple[bytes, ...]
    parent_block_hash: bytes | None
    token_ids: tuple[int, ...]
    block_size: int
    medium: str
    namespace: str


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Pages left a medium."""

    block_hashes: tuple[bytes, ...]
    medium: str


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Every medium is empty: the cache was flushed."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class Journal:
    """Writes KV events of one kind as the tree changes."""

    def __init__(self, naming: Naming, kind_index: int) -> None:
        self._naming = naming
        self._kind_index = kind_index
        self.events: list[KVEvent] = []

    def came(self, node: Node, shelf: Shelf, lo: int, count: int) -> None:
        """Pages ``[lo, lo + count)`` of a node are on a shelf now."""
        if shelf.kind_index != self._kind_index:
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
        tokens = node.tokens[lo * size : (lo + count) * size]
        self.events.append(
            BlockStored(
                block_hashes=tuple(digests[lo : lo + count]),
                parent_block_hash=above or None,
                token_ids=tuple(tokens.tolist()),
                block_size=size,
                medium=MEDIUM[shelf.tier],
                namespace=root.namespace,
            )
        )

    def left(self, node: Node, shelf: Shelf, lo: int, count: int) -> None:
        """Pages ``[lo, lo + count)`` of a node are about to leave a shelf."""
        if shelf.kind_index == self._kind_index:
            digests = page_digests(self._naming, node)
            self.events.append(BlockRemoved(tuple(digests[lo : lo + count]), MEDIUM[shelf.tier]))


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
