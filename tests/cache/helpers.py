"""Short ways to drive a cache in tests."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from rootcellar.cache import Done, Key, Kind, Lease, Tier, full, recurrent, sliding_window
from rootcellar.cache.radix import PyRadixCache

CORES: dict[str, type] = {"python": PyRadixCache}
if find_spec("rootcellar.cache._core") is not None:
    from rootcellar.cache.native import NativeRadixCache

    CORES["native"] = NativeRadixCache
core = "python"  # set by the fixture of this name
KINDS = {
    "full": (full("full"),),
    "window": (full("full"), sliding_window("window", window=6)),
    "state": (full("full"), recurrent("state")),
}


def RadixCache(*arguments: Any, **options: Any) -> Any:
    """A cache with the core that is being tested."""
    return CORES[core](*arguments, **options)


def make(kinds: tuple[Kind, ...] = (full("full"),), size: int = 64, page_size: int = 4, **options) -> PyRadixCache:
    """A cache with ``size`` tokens (8 states) per kind on DEVICE and on the further ``tiers``."""
    tiers = (Tier.DEVICE, *options.pop("tiers", ()))
    capacity = {(k.name, tier): 8 if k.rule == "recurrent" else size for k in kinds for tier in tiers}
    capacity |= options.pop("capacity", {})
    options.setdefault("max_length", 4096)
    return RadixCache(kinds, page_size=page_size, capacity=capacity, **options)


def serve(cache: PyRadixCache, tokens, *, namespace: str = "", chunk: int | None = None, keep: bool = True) -> Lease:
    """A whole request, chunk by chunk; returns the closed lease."""
    lease = start(cache, tokens, namespace=namespace, chunk=chunk)
    cache.close(lease, keep=keep)
    return lease


def start(cache: PyRadixCache, tokens, *, namespace: str = "", chunk: int | None = None, tier=Tier.DEVICE) -> Lease:
    """A request that has computed and committed all its tokens."""
    key = Key(tokens, namespace)
    lease = cache.open(cache.match(key), tier)
    assert lease is not None
    while lease.length < len(key):
        assert cache.grow(lease, min(chunk or len(key), len(key) - lease.length))
        cache.commit(lease, key[: lease.length])
    cache.check()
    return lease


def tokens(*parts: tuple[int, int]) -> np.ndarray:
    """Runs of token ids: ``(first, count)`` each."""
    return np.concatenate([np.arange(first, first + count) for first, count in parts])


def land(cache, event=Done) -> int:
    """Report every move, and those that follow from it; how many there were."""
    count = 0
    while moves := cache.moves():
        for move in moves:
            cache.learn(event(move.id))
            count += 1
        cache.check()
    return count


def up(cache, src, dst) -> list:
    """Report the moves of now, which are all from ``src`` to ``dst``."""
    moves = cache.moves()
    assert {(move.src, move.dst) for move in moves} == {(src, dst)}
    for move in moves:
        cache.learn(Done(move.id))
    cache.check()
    return moves


def push_out(cache, count=16) -> None:
    """Fill the device with other prompts, then let the copies land."""
    for i in range(count):
        serve(cache, tokens((10_000 + 100 * i, 16)))
        land(cache)


def cached(cache: PyRadixCache, key: Key) -> int:
    """Tokens of ``key`` that the device could give, without counting as a use."""
    return cache.explain(key).reaches[Tier.DEVICE]
