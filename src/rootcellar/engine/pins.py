"""Pinned prompts, each with an end in seconds: the cache counts time in ticks. For the engine's thread.

Two sorts: a *pin* stays till its end, what is *retained* also gives way to requests that find no room, and to pins.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rootcellar.cache import Key, RadixCache
from rootcellar.errors import RequestTooLarge

# More ticks than any server lives: the engine's clock decides.
_FOREVER = 2**40
# What pins may hold of the cache: requests must still find room.
_MOST = 0.5

Name = tuple[str, Key, bool]
"""Whose, of which tokens, and whether it is only retained."""


@dataclass
class _Pin:
    name: Name
    ends: float
    tokens: int
    node: int = field(default=0)
    """The tree's node that ends where the pin does: the cache lets go of all pins on a way together."""

    @property
    def held(self) -> Key:
        """The part of its tokens that is pinned."""
        return self.name[1][: self.tokens]


class Pins:
    """What is kept for tenants."""

    def __init__(self, cache: RadixCache, total_tokens: int) -> None:
        """``total_tokens``: what ``cache`` holds."""
        self._cache = cache
        self._limit = int(total_tokens * _MOST)
        self._pins: dict[Name, _Pin] = {}
        self._at: dict[int, set[Name]] = {}
        """Pins by their nodes."""
        self._held: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    # -- what is kept ---------------------------------------------------------------------------------------------

    def add(
        self, tenant: str, key: Key, ends: float, share: float, *, retain: bool = False, clip: bool = False
    ) -> tuple[int, int]:
        """Keep what is cached of ``key`` until ``ends``; the tokens that are, and how many pins the tenant has now.

        ``share``: the part of what pins may hold that the tenant's may. ``clip``: keep as much as there is room for.
        ``RequestTooLarge``: that would be too much.
        """
        name = tenant, key, retain
        before = self._pins.get(name)
        if before is not None:
            self._let_go(before)
            ends = max(ends, before.ends) if retain else ends
        tokens = self._cache.match(key).length
        if retain:
            self._let_go_of_covered(tenant, key, ends)
        else:
            self._make_room_for_pin(tenant, tokens, share)
        room = self.room(tenant, share)
        if clip and tokens > room:
            tokens = room - room % self._cache.page_size
        if tokens > room:
            if before is not None:
                self._put(before)
            mine, limit = self._held[tenant] + tokens, int(self._limit * share)
            held, may = (mine, limit) if mine > limit else (self._held.total() + tokens, self._limit)
            raise RequestTooLarge(
                f"pins would hold {held} tokens, and may hold {may} (all of them half of the KV cache): unpin "
                "others or raise max_total_tokens"
            )
        if tokens:
            self._put(_Pin(name, ends, tokens))
        return tokens, self._counts[tenant]

    def room(self, tenant: str, share: float) -> int:
        """Tokens that the tenant may still pin."""
        return max(0, min(self._limit - self._held.total(), int(self._limit * share) - self._held[tenant]))

    def remove(self, tenant: str, key: Key, *, retained: bool = False) -> bool:
        """Undo :meth:`add`; False when there was nothing to undo."""
        pin = self._pins.get((tenant, key, retained))
        if pin is not None:
            self._let_go(pin)
        return pin is not None

    def expire(self, now: float) -> None:
        """Let go of those whose end has come."""
        for pin in [pin for pin in self._pins.values() if pin.ends <= now]:
            self._let_go(pin)

    def forget(self) -> None:
        """Let go of all: what they pin is no hit any more."""
        for pin in list(self._pins.values()):
            self._cache.unpin(pin.name[1])
        self._pins.clear()
        self._at.clear()
        self._held.clear()
        self._counts.clear()

    def make_way(self, tokens: int) -> int:
        """Let go of what is only retained, what is wanted last first, until ``tokens`` are; how many that were."""
        gone = 0
        for pin in sorted((pin for pin in self._pins.values() if pin.name[2]), key=lambda pin: -pin.ends):
            if gone >= tokens:
                break
            self._let_go(pin)
            gone += pin.tokens
        return gone

    @property
    def retained(self) -> bool:
        """Whether something is kept that may give way."""
        return any(retained for _, _, retained in self._pins)

    @property
    def next_end(self) -> float | None:
        """When the first of them ends."""
        return min((pin.ends for pin in self._pins.values()), default=None)

    # -- how ------------------------------------------------------------------------------------------------------

    def _let_go_of_covered(self, tenant: str, key: Key, ends: float) -> None:
        """Let go of what the tenant retains of ``key`` already, and not for longer: a conversation grows."""
        names = [name for node in self._cache.trail(key) for name in self._at.get(node, ())]
        for pin in [self._pins[name] for name in names if name[0] == tenant and name[2]]:
            if pin.ends <= ends:
                self._let_go(pin)

    def _make_room_for_pin(self, tenant: str, tokens: int, share: float) -> None:
        """Let go of what the tenant only retains, as far as its pin of so many tokens needs that."""
        own = [pin for pin in self._pins.values() if pin.name[0] == tenant and pin.name[2]]
        for pin in sorted(own, key=lambda pin: -pin.ends):
            if self.room(tenant, share) >= tokens:
                return
            self._let_go(pin)

    def _put(self, pin: _Pin) -> None:
        self._pin(pin)
        self._pins[pin.name] = pin
        self._held[pin.name[0]] += pin.tokens
        self._counts[pin.name[0]] += 1

    def _pin(self, pin: _Pin) -> None:
        pin.tokens = self._cache.pin(pin.held, _FOREVER)
        way = self._cache.trail(pin.held)
        pin.node = way[-1] if way else 0
        self._at.setdefault(pin.node, set()).add(pin.name)

    def _let_go(self, pin: _Pin) -> None:
        """Undo one pin. The cache undoes with it those that end on the key's way: they are pinned again at once."""
        del self._pins[pin.name]
        self._held[pin.name[0]] -= pin.tokens
        self._counts[pin.name[0]] -= 1
        self._leave(pin)
        key = pin.name[1]
        others = [self._pins[name] for node in self._cache.trail(key) for name in self._at.get(node, ())]
        self._cache.unpin(key)
        for other in others:
            self._leave(other)
            before = other.tokens
            self._pin(other)
            self._held[other.name[0]] += other.tokens - before

    def _leave(self, pin: _Pin) -> None:
        names = self._at[pin.node]
        names.discard(pin.name)
        if not names:
            del self._at[pin.node]
