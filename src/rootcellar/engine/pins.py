"""Pinned prompts, each with an end in seconds: the cache counts time in ticks. For the engine's thread.

Three sorts. A ``pin`` stays till its end. What is ``kept`` does too, for a conversation that grows: a longer one takes
the place of those that it begins with, and the oldest makes way where a request finds no room though nobody runs. What
is ``retained`` is so, and is not pinned: the cache expects it until its end, or, if it is for ``once``, until a request
came that goes on from it, so that it leaves after all else, and what is wanted last first. It counts as what its tenant
keeps all the same, and gives way to the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from rootcellar.cache import LATEST, Key, RadixCache
from rootcellar.errors import RequestTooLarge

# More ticks than any server lives: the engine's clock decides.
_FOREVER = 2**40
# The cache is told of ends in tenths of seconds.
_TENTHS = 10
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
    once: bool = False
    known: bool = True
    node: int = field(default=0)
    """The tree's node that ends where the pin does: the cache lets go of all pins on a way together."""

    @property
    def held(self) -> Key:
        """The part of its tokens that is pinned."""
        return self.name[1][: self.tokens]

    @property
    def expected(self) -> bool:
        """Whether it can leave: the cache is told until when it is wanted."""
        return self.name[2] == "retained"


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
        self,
        tenant: str,
        key: Key,
        ends: float,
        share: float,
        *,
        sort: Sort = "pin",
        clip: bool = False,
        once: bool = False,
        known: bool = True,
    ) -> tuple[int, int]:
        """Keep what is cached of ``key`` until ``ends``; the tokens that are, and how many pins the tenant has now.

        ``share``: the part of what pins may hold that the tenant's may. ``clip``: keep as much as there is room for.
        ``once``: until a request came (:meth:`came`). ``known``: whether it is known what that costs others.
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
            self._put(_Pin(name, ends, tokens, once, known))
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

    def came(self, tenant: str, key: Key) -> None:
        """The tenant's request for ``key`` was computed: what was retained for once, and that goes on from, is over."""
        if self._at:
            names = [name for node in self._cache.trail(key) for name in self._at.get(node, ()) if name[0] == tenant]
            for pin in [self._pins[name] for name in names]:
                if pin.once and key[: len(pin.name[1])] == pin.name[1]:
                    self._let_go(pin)

    def give_up(self, unknown: float, known: float) -> None:
        """Let go of what is only retained, until after one of these times: by whether it was known what that costs."""
        for pin in [pin for pin in self._pins.values() if pin.ends > (known if pin.known else unknown)]:
            if pin.expected:
                self._let_go(pin)

    def make_way(self) -> bool:
        """Let go of the oldest conversation that is kept, for a request that finds no room; False: there is none."""
        pin = next((pin for (_, _, sort), pin in self._pins.items() if sort == "kept"), None)
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
            self._undo(pin)
        self._pins.clear()
        self._at.clear()
        self._held.clear()
        self._counts.clear()

    @property
    def next_end(self) -> float | None:
        """When the first of them ends."""
        return min((pin.ends for pin in self._pins.values()), default=None)

    def next_end_of(self, sort: Sort) -> float | None:
        """The same of one sort."""
        return min((pin.ends for pin in self._pins.values() if pin.name[2] == sort), default=None)

    # -- how ------------------------------------------------------------------------------------------------------

    def _covered(self, tenant: str, key: Key, sort: Sort, ends: float) -> list[_Pin]:
        """What the tenant keeps so of the beginnings of ``key``, and not for longer: a conversation grows."""
        names = [name for node in self._cache.trail(key) for name in self._at.get(node, ())]
        own = [self._pins[name] for name in names if name[0] == tenant and name[2] == sort and name[1] != key]
        return [pin for pin in own if pin.ends <= ends]

    def _retained_of(self, tenant: str) -> list[_Pin]:
        """What is only retained for a tenant, what is wanted last first."""
        own = [pin for (whose, _, sort), pin in self._pins.items() if sort == "retained" and tenant == whose]
        return sorted(own, key=lambda pin: -pin.ends)

    def _put(self, pin: _Pin) -> None:
        self._pin(pin)
        self._pins[pin.name] = pin
        self._held[pin.name[0]] += pin.tokens
        self._counts[pin.name[0]] += 1

    def _pin(self, pin: _Pin) -> None:
        if pin.expected:
            pin.tokens = self._cache.expect(pin.held, max(1, min(int(pin.ends * _TENTHS), LATEST)))
        else:
            pin.tokens = self._cache.pin(pin.held, _FOREVER)
        way = self._cache.trail(pin.held)
        pin.node = way[-1] if way else 0
        self._at.setdefault(pin.node, set()).add(pin.name)

    def _let_go(self, pin: _Pin) -> None:
        """Undo one pin. The cache undoes with it those that end on the key's way: they are kept again at once."""
        del self._pins[pin.name]
        self._held[pin.name[0]] -= pin.tokens
        self._counts[pin.name[0]] -= 1
        self._leave(pin)
        names = [name for node in self._cache.trail(pin.name[1]) for name in self._at.get(node, ())]
        others = [other for name in names if (other := self._pins[name]).expected == pin.expected]
        self._undo(pin)
        for other in others:
            self._leave(other)
            before = other.tokens
            self._pin(other)
            self._held[other.name[0]] += other.tokens - before

    def _undo(self, pin: _Pin) -> None:
        """Tell the cache that a prompt is not kept any more, and none of those like it that the prompt begins with."""
        if pin.expected:
            self._cache.expect(pin.name[1], 0)
        else:
            self._cache.unpin(pin.name[1])

    def _leave(self, pin: _Pin) -> None:
        names = self._at[pin.node]
        names.discard(pin.name)
        if not names:
            del self._at[pin.node]
