"""Pinned prompts, each with an end in seconds: the cache counts time in ticks. For the engine's thread."""

from __future__ import annotations

from dataclasses import dataclass

from rootcellar.cache import Key, RadixCache
from rootcellar.errors import RequestTooLarge

# More ticks than any server lives: the engine's clock decides.
_FOREVER = 2**40
# What pins may hold of the cache: requests must still find room.
_MOST = 0.5


@dataclass
class _Pin:
    tenant: str
    key: Key
    ends: float
    tokens: int


class Pins:
    """What is kept for tenants."""

    def __init__(self, cache: RadixCache, total_tokens: int) -> None:
        """``total_tokens``: what ``cache`` holds."""
        self._cache = cache
        self._limit = int(total_tokens * _MOST)
        self._pins: dict[tuple[str, Key], _Pin] = {}

    def add(self, tenant: str, key: Key, ends: float, share: float) -> tuple[int, int]:
        """Keep what is cached of ``key`` until ``ends``; the tokens that are, and how many pins the tenant has now.

        ``share``: the part of what pins may hold that the tenant's may. ``RequestTooLarge``: that would be too much.
        """
        name = tenant, key
        before = self._pins.get(name)
        self._pins[name] = _Pin(tenant, key, ends, 0)
        self._renew()
        own = [each for each in self._pins.values() if each.tenant == tenant]
        total, mine = (sum(each.tokens for each in pins) for pins in (self._pins.values(), own))
        limit = int(self._limit * share)
        if total > self._limit or mine > limit:
            self._put(name, before)
            held, may = (mine, limit) if mine > limit else (total, self._limit)
            raise RequestTooLarge(
                f"pins would hold {held} tokens, and may hold {may} (all of them half of the KV cache): unpin "
                "others or raise max_total_tokens"
            )
        pin = self._pins.get(name)
        return 0 if pin is None else pin.tokens, len(own)

    def remove(self, tenant: str, key: Key) -> bool:
        """Undo :meth:`add`; False when there was nothing to undo."""
        name = tenant, key
        found = name in self._pins
        self._put(name, None)
        return found

    def expire(self, now: float) -> None:
        """Let go of those whose end has come."""
        for name in [name for name, pin in self._pins.items() if pin.ends <= now]:
            self._put(name, None)

    @property
    def next_end(self) -> float | None:
        """When the first of them ends."""
        return min((pin.ends for pin in self._pins.values()), default=None)

    def _put(self, name: tuple[str, Key], pin: _Pin | None) -> None:
        """Put ``pin`` in the place of ``name``'s, and let go of what nobody pins any more."""
        if name in self._pins:
            self._cache.unpin(name[1])
            del self._pins[name]
        if pin is not None:
            self._pins[name] = pin
        self._renew()

    def _renew(self) -> None:
        """Pin all anew: the cache's ``unpin`` undoes a prefix's pins with it. Nothing can leave in between."""
        for pin in self._pins.values():
            self._cache.unpin(pin.key)
        for pin in self._pins.values():
            pin.tokens = self._cache.pin(pin.key, _FOREVER)
        self._pins = {name: pin for name, pin in self._pins.items() if pin.tokens}
