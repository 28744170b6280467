"""What a cache does, said once: both cores do it, with the same results, errors and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache.control import Prefetch
from rootcellar.cache.explain import Explanation, everybody
from rootcellar.cache.journal import Eviction, KVEvent
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.lease import Lease, ReqToTokenPool
from rootcellar.cache.match import Hit
from rootcellar.cache.moves import Event, Manifest, Move, Question
from rootcellar.cache.stats import CacheStats
from rootcellar.cache.views import TreeView


class PrefixCache(Protocol):
    """A prefix cache over the kinds and tiers it is given. Pure logic: it decides and never copies, waits or sleeps.

    ``RadixCache(kinds, capacity=..., ...)`` makes one: the arguments are those of ``Settings``. Its page tables are
    ``tables``. Every error is worded in ``words.py``.
    """

    kinds: tuple[Kind, ...]
    page_size: int
    tables: ReqToTokenPool

    # ---- the verbs ----------------------------------------------------------------------------------------------

    def match(self, key: Key) -> Hit:
        """How far ``key`` is cached, per tier. Changes nothing but recency. O(tokens matched + nodes on the path)."""

    def open(
        self, hit: Hit, tier: Tier = Tier.DEVICE, *, priority: int = 0, room: Mapping[str, int] | None = None
    ) -> Lease | None:
        """Pin what the rule needs in order to resume at ``hit.reach(tier)``. None when there is no room for it.

        ``room`` asks for more before anything is opened: None too, and nothing counted or changed, unless so many
        tokens of each paged kind, by its name and rounded up to whole pages, could then be grown, all together.

        What STORAGE alone has comes by way of HOST; where HOST has no room for it, what is nearer is resumed from.

        A stale hit (the tree changed since ``match``) is looked up again; with ``room``, which was made for the hit as
        it was, the answer is None when it has become shorter. Raises ``RequestTooLarge`` when the key is longer than
        ``max_length``.
        """

    def grow(self, lease: Lease, tokens: int, *, step: bool = True) -> bool:
        """Slots for ``tokens`` more tokens, for the next step. May evict. False: nothing changed, wait or retract.

        One call is one step: a recurrent kind's state to read becomes, from the second call on, the one written.
        Without ``step`` the slots are for more tokens of the step that the call before was for. Less than 0 tokens: the
        last slots go back, whose tokens (a wrong guess) are the lease's no more; the state written must then be that
        before them.
        Raises ``RequestTooLarge`` when the row is full (``max_length``), ``RequestError`` where what goes back is
        committed.
        """

    def grow_many(self, leases: Sequence[Lease], tokens: int | Sequence[int] = 1) -> list[bool]:
        """:meth:`grow` for each lease of a batch, in order; False for those that found no room.

        ``tokens`` is the same for all, or one number for each.
        """

    def commit(self, lease: Lease, key: Key, *, snapshot: bool = True) -> None:
        """Make the whole pages of ``key``, the request's first ``len(key)`` tokens, all computed, shareable.

        Where the tree has a page already the lease's duplicate is freed and its row points to the tree's page. Pages
        before the rule's start at ``len(key)`` leave the row. When ``key`` is all the lease has and ends on a page,
        ``snapshot`` hands the recurrent state to the tree (skipped when no state is free).
        Raises ``RequestError`` for a key longer than the lease or of another namespace.
        """

    def commit_many(self, leases: Sequence[Lease], keys: Sequence[Key], *, snapshot: bool = True) -> None:
        """:meth:`commit` for each lease of a batch, in order."""

    def close(self, lease: Lease, keep: bool = True) -> None:
        """End a lease: finished, aborted and retracted alike. What was not committed is freed.

        ``keep=False`` also throws away what this request added to the tree and nobody else uses.
        """

    def close_many(self, leases: Sequence[Lease], keep: bool = True) -> None:
        """:meth:`close` for each lease of a batch, in order."""

    def slots(self, hit: Hit, kind: str) -> NDArray[np.int32]:
        """Where the device holds the ``hit.length`` tokens of a hit, for a paged kind: int32 ``[hit.length]``.

        A token's slot is ``page * page_size + position % page_size``; slots of page 0 stand for what the kind does not
        hold (any more). A stale hit is looked up again. Nothing is pinned: ask a lease's row for what must stay.
        Raises ``KeyError`` for a kind that is not there or not paged.
        """

    def make_room(self, kind: str, tokens: int, tier: Tier = Tier.DEVICE) -> bool:
        """Evict until ``tokens`` of a kind are free on a tier. False, and nothing changed, when that cannot be.

        ``grow`` and ``open`` do this by themselves. Raises ``KeyError`` for a kind that is not on that tier.
        """

    def flush(self) -> None:
        """Forget everything. Raises ``CacheBusy`` while leases or copies are live."""

    # ---- tiers --------------------------------------------------------------------------------------------------

    def moves(self) -> list[Move]:
        """The copies planned since the last call, in the order in which to dispatch them (see ``moves.py``)."""

    def learn(self, event: Event) -> None:
        """What the movers saw: ``Done``, ``Failed``, ``Found`` or ``Lost``. A move that is not known is ignored."""

    def ask(self, key: Key, tier: Tier = Tier.STORAGE) -> Question | None:
        """What to ask a store or a peer of ``key``, whose answer is then learned. None when it could add nothing.

        That is so where ``tier`` or nearer ones have all whole pages, or a kind is never kept there. Changes nothing.
        """

    def send(self, key: Key, start: int = 0) -> Manifest | None:
        """Offer a peer that can resume at ``start`` (tokens) what it needs in order to resume at the end of ``key``.

        As far as the device holds it, in whole pages; None when that is not beyond ``start``. What is offered stays
        on the device until the manifest's ``id`` is reported, ``Done`` or ``Failed``. Each call is an offer of its own:
        several peers may be sent the same, and one peer, chunk by chunk, what was computed meanwhile.
        """

    def save(self, tier: Tier = Tier.HOST) -> int:
        """Plan to copy to HOST all that the device holds and HOST lacks; returns the number of moves.

        With STORAGE also what HOST holds and STORAGE lacks; what comes to HOST goes on to STORAGE by itself.
        """

    def write_down(self, key: Key) -> int:
        """Plan to copy what the device holds of ``key`` to HOST, and what HOST has of it to STORAGE, by any policy.

        As far as resuming there needs it; what comes to HOST goes on to STORAGE. Returns the number of moves.
        """

    def forget_tier(self, tier: Tier) -> None:
        """Forget what a tier holds, and with DEVICE every pin. Nothing of other tiers, or for them, is in the way.

        Raises ``CacheBusy`` while copies from or to the tier are live; of DEVICE, while leases and offers are, too.
        """

    def write_to(self, tier: Tier, on: bool) -> None:
        """Whether copies may be written to HOST or STORAGE from now on; what is under way, and loading, goes on.

        What is not written meanwhile counts as nothing. Raises ``ConfigError`` for any other tier, or one without room.
        """

    def prefetch(self, hit: Hit, tier: Tier = Tier.STORAGE) -> Prefetch | None:
        """Plan to bring what ``tier`` adds to a hit to HOST; None when it is not worth it (``min_load``)."""

    def pending(self, prefetch: Prefetch) -> int:
        """How many moves of a prefetch are not yet reported."""

    # ---- control ------------------------------------------------------------------------------------------------

    def pin(self, key: Key, ttl: int) -> int:
        """Keep what the device holds of ``key`` for ``ttl`` ticks (a tick is an opened lease). Returns its tokens."""

    def unpin(self, key: Key) -> int:
        """Undo the pins of prefixes of ``key``; returns how many there were."""

    def expect(self, key: Key, when: int) -> int:
        """Say when what the device has of ``key`` is wanted again; returns how many of its tokens that is about.

        ``when``, in any unit that grows, up to ``LATEST``: what resuming there needs leaves after all else, on any
        tier, and of several what is wanted last first. Unlike pinned it can leave. ``NEVER``: it is the first to leave
        the device, as far as no other prompt goes on from it or is expected, until it is asked for after all.
        0: nothing is known of it any more; say it again of keys that ``key`` begins with, which that forgot too.
        """

    def foresee(self, keys: Sequence[Key]) -> int:
        """Say which prompts wait, the next first, in place of those that were said before.

        What they need to resume leaves last of all, on any tier, and of several what is wanted last first. It can
        leave. Once that is as much as the device holds, the rest of ``keys`` is passed over. Returns how many tokens
        it is. O(tokens matched + nodes).
        """

    def drop_namespace(self, namespace: str) -> int:
        """Forget a namespace (LoRA, tenant, old weights). Returns the tokens that live leases keep till they close."""

    # ---- observability ------------------------------------------------------------------------------------------

    def available_tokens(self) -> int:
        """Tokens that could be grown now: free plus evictable, the least over the paged kinds. O(kinds).

        Kinds that share an arena take a page each for the same tokens.
        """

    def used_pages(self, kind: str, tier: Tier = Tier.DEVICE) -> NDArray[np.int32]:
        """The pages of a kind on a tier that are not free, ascending: whose bytes somebody may want. O(pages).

        Where kinds share an arena, the pages of all of them: they lie in the same buffers.
        """

    def stats(self) -> CacheStats:
        """Counts per kind and tier and running totals. O(kinds * tiers)."""

    def take_events(self) -> list[KVEvent]:
        """The KV events since the last call, oldest first; empty unless the cache was made with ``events``."""

    @property
    def tick(self) -> int:
        """Leases opened so far: the cache's clock, in which ages are counted."""

    def take_evictions(self) -> list[Eviction]:
        """What was evicted since the last call, oldest first; at most the newest 4,096 entries."""

    def tree(self, limit: int = 200) -> TreeView:
        """The ``limit`` most important nodes, for pictures: in use, then most often hit, then most recent."""

    def trail(self, key: Key) -> tuple[int, ...]:
        """Ids, as in :meth:`tree`, of the nodes that ``key`` goes through. Changes nothing, not even recency."""

    def last_eviction(self, key: Key) -> Eviction | None:
        """How the page after what the tree knows of ``key`` left, where that was evicted lately; None: it was not.

        Changes nothing, not even recency. O(tokens matched + nodes on the path).
        """

    def explain(self, key: Key, may_name: Callable[[str], bool] = everybody) -> Explanation:
        """Why ``key`` hits as far as it does. Changes nothing, not even recency.

        ``may_name``: whether another namespace may be named as one that has more of the key.
        """

    def pretty_print(self, limit: int = 100) -> str:
        """The tree in words, at most ``limit`` nodes."""

    def check(self) -> None:
        """Recount every invariant, O(cache). Raises ``CacheBroken`` with the evidence."""

    def memory_bytes(self) -> int:
        """Bytes that the tree, the orders of leaving and the allocators take, page tables not counted. O(cache)."""
