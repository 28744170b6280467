"""Requests that share a prefix: one computes it, the others take it from the cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import Hit, RadixCache, Tier
from rootcellar.scheduler.request import Met, Request
from rootcellar.scheduler.shares import call_of

# A waiting request is held back while a running one computes a prefix that would save it at least this many tokens.
_WORTH_WAITING = 32


@dataclass(frozen=True)
class Sharing:
    """When a request should wait for another's prefix.

    Attributes:
        reuse: whether the cache shares anything; if not, nobody waits.
        little: who has no more tokens to compute waits for its own call alone.
        page_size: tokens in a page.
        states: whether requests leave recurrent states.
    """

    reuse: bool
    little: int
    page_size: int
    states: bool

    def soon(self, request: Request, cached: int, running: Iterable[Request]) -> bool:
        """Whether a running request is about to compute a prefix that this one could then take from the cache.

        ``cached``: tokens that are there already.
        """
        if not self.reuse:
            return False
        little = request.length - cached <= self.little
        worth = cached + max(_WORTH_WAITING, self.page_size)
        limit = request.matchable
        for other in running:
            end = min(limit, other.length)
            if other.remaining <= 1 or end < worth:
                continue
            if call_of(other) != call_of(request) and (little or other.tenant != request.tenant):
                continue  # nobody is kept waiting by others for what is soon computed, or by another tenant at all
            if (other.namespace, other.epoch) != (request.namespace, request.epoch):
                continue
            if np.array_equal(request.ids[:worth], other.ids[:worth]):
                if self.states:
                    self._meet(request.ids[:end], other)
                return True
        return False

    def _meet(self, ids: NDArray[np.int64], other: Request) -> None:
        """Let a running request leave a state where one that waits for it will go another way."""
        differs = ids != other.ids[: len(ids)]
        shared = int(differs.argmax()) if differs.any() else len(ids)
        shared -= shared % self.page_size
        if shared > other.computed and not other.computed < other.branch < shared:
            other.branch = shared


def note_met(request: Request, hit: Hit, cache: RadixCache) -> None:
    """What ``cache`` knew of a request that it has just opened, for whoever explains it; until it was computed once."""
    if request.cached is None:
        wanted = request.matchable
        gone = cache.last_eviction(request.key(wanted)) if hit.branch + cache.page_size <= wanted else None
        request.met = Met(wanted, tuple(hit.reach(tier) for tier in Tier), hit.branch, gone)
        request.opened = cache.tick


def note_cached(request: Request, hit: Hit) -> None:
    """What the cache gave a request that can now be computed, if this is the first time: how much, and which tiers."""
    if request.cached is None:
        request.cached = min(request.computed, request.prompt_length)
        request.cached_by_tier = _by_tier(hit, request.cached, request.stored)


def _by_tier(hit: Hit, cached: int, stored: int) -> dict[str, int]:
    """Which tier gave how many of the ``cached`` tokens, by SGLang's names; ``stored`` came by way of the host."""
    device = min(hit.length, cached)
    storage = min(stored, cached - device)
    return {"device": device, "host": cached - device - storage, "storage": storage}
