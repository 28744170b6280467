"""Pinned prompts, each with an end in seconds: the cache counts time in ticks. For the engine's thread.

Three sorts. A ``pin`` stays till its end. What is ``kept`` does too, for a conversation that grows: a longer one takes
the place of those that it begins with. What is ``retained`` is so, and also gives way to requests that find no room,
and to the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from rootcellar.cache import Key, RadixCache
from rootcellar.errors import RequestTooLarge

# More ticks than any server lives: the engine's clock decides.
_FOREVER = 2**40
# What pins may hold of the cache: requests must still find room.
_MOST = 0.5

# What a tenant's conversations may keep: each costs a walk through the cache's tree whenever another begins or ends.
_MOST_KEPT = 1024

Sort = Literal["pin", "kept", "retained"]
SORTS: tuple[Sort, ...] = ("pin", "kept", "retained")
Name = tuple[str, Key, Sort]
"""Whose, of which tokens, and of which sort."""


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
        self, tenant: str, key: Key, ends: float, share: float, *, sort: Sort = "pin", clip: bool = False
    ) -> tuple[int, int]:
        """Keep what is cached of ``key`` until ``ends``; the tokens that are, and how many pins the tenant has now.

        ``share``: the part of what pins may hold that the tenant's may. ``clip``: keep as much as there is room for.
        ``RequestTooLarge``: that would be too much; nothing has changed.
        """
        name = tenant, key, sort
        before = self._pins.get(name)
        going = [] if before is None else [before]
        if sort != "pin":
            ends = ends if before is None else max(ends, before.ends)
            going += self._covered(tenant, key, sort, ends)
        tokens = self._cache.match(key).length
        room = self.room(tenant, share) + sum(pin.tokens for pin in going)
        if sort != "retained":
            for pin in self._retained_of(tenant):
                if room >= tokens:
                    break
                going.append(pin)
                room += pin.tokens
        room = max(0, room)
        if clip and tokens > room:
            tokens = room - room % self._cache.page_size
        if tokens > room:
            more, limit = tokens - sum(pin.tokens for pin in going), int(self._limit * share)
            mine = self._held[tenant] + more
            held, may = (mine, limit) if mine > limit else (self._held.total() + more, self._limit)
            raise RequestTooLarge(
                f"pins would hold {held} tokens, and may hold {may} (all of them half of the KV cache): unpin "
                "others or raise max_total_tokens"
            )
        for pin in going:
            self._let_go(pin)
        if tokens:
            self._put(_Pin(name, ends, tokens))
        if sort == "kept":
            own = [pin for (whose, _, its), pin in self._pins.items() if (whose, its) == (tenant, sort)]
            for pin in own[: max(0, len(own) - _MOST_KEPT)]:  # the oldest are first
                self._let_go(pin)
        return tokens, self._counts[tenant]

    def room(self, tenant: str, share: float) -> int:
        """Tokens that the tenant may still pin; less than none where its share became smaller."""
        return min(self._limit - self._held.total(), int(self._limit * share) - self._held[tenant])

    def remove(self, tenant: str, key: Key, sort: Sort = "pin") -> bool:
        """Undo :meth:`add`; False when there was nothing to undo."""
        pin = self._pins.get((tenant, key, sort))
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
        for pin in self._retained_of(None):
            if gone >= tokens:
                break
            self._let_go(pin)
            gone += pin.tokens
        return gone

    @property
    def retained(self) -> bool:
        """Whether something is kept that may give way."""
        return any(sort == "retained" for _, _, sort in self._pins)

    @property
    def next_end(self) -> float | None:
        """When the first of them ends."""
        return min((pin.ends for pin in self._pins.values()), default=None)

    # -- how ------------------------------------------------------------------------------------------------------

    def _covered(self, tenant: str, key: Key, sort: Sort, ends: float) -> list[_Pin]:
        """What the tenant keeps so of the beginnings of ``key``, and not for longer: a conversation grows."""
        names = [name for node in self._cache.trail(key) for name in self._at.get(node, ())]
        own = [self._pins[name] for name in names if name[0] == tenant and name[2] == sort and name[1] != key]
        return [pin for pin in own if pin.ends <= ends]

    def _retained_of(self, tenant: str | None) -> list[_Pin]:
        """What is only retained for a tenant (None: for all), what is wanted last first."""
        own = [pin for (whose, _, sort), pin in self._pins.items() if sort == "retained" and tenant in (None, whose)]
        return sorted(own, key=lambda pin: -pin.ends)

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
