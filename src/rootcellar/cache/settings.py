"""What a cache is made with: the one list of settings, which both cores read by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rootcellar.cache import words
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.order import policy_named
from rootcellar.errors import ConfigError

WRITE_POLICIES = ("write_through", "write_through_selective", "write_back")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of ``RadixCache``, checked. C++ reads those that ``native/settings.h`` names.

    Args:
        kinds: the model's groups of layers, by the rule of :class:`Kind`.
        page_size: tokens in a page, at least 1, the same for all kinds.
        capacity: tokens (states, for a recurrent kind) by ``(kind name, tier)``, rounded down to whole pages. Each
            kind needs ``Tier.DEVICE``; any other tier is there only when named, STORAGE only above HOST. Pages are
            numbered from 1; page 0 is the padding target and never allocated.
        arenas: kinds that draw their pages from one allocator, by the name that ``capacity`` then sizes it under
            instead of theirs: kinds whose pages take the same bytes and lie in the same buffers. A state of a
            recurrent kind among paged ones takes a page. On a tier where ``capacity`` names them they stay apart; on
            the device they may not.
        max_leases: rows of the page tables.
        max_length: tokens in a row.
        policy: the order in which entries leave; see ``order.POLICIES``.
        reuse: False makes it SGLang's ``ChunkCache``: nothing is ever shared, the verbs stay.
        write_policy: when the device's entries are copied to HOST: ``write_through`` (as requests leave them),
            ``write_through_selective`` (after ``write_hits`` requests resumed from them), ``write_back`` (as they are
            evicted). What arrives on HOST is copied on to STORAGE where there is one.
        closed: tiers that nothing is written to until ``write_to`` says so.
        min_load: tokens that a farther tier must add to a hit to be worth loading, by tier; 1 where not given.
        fingerprint: names model, revision and layout in digests: whatever changes a page's bytes.
        events: record KV events, for ``take_events`` (costs one SHA-256 a page).
        digests: name every page by its digest when it is committed, rather than when something first asks for it.

    Raises:
        ConfigError: a setting is wrong; the message says which.
    """

    kinds: tuple[Kind, ...]
    page_size: int = 16
    capacity: Mapping[tuple[str, Tier], int]
    arenas: Mapping[str, Sequence[str]] | None = None
    max_leases: int = 256
    max_length: int = 32768
    policy: str = "lru"
    reuse: bool = True
    write_policy: str = "write_through"
    write_hits: int = 2
    closed: Sequence[Tier] = ()
    min_load: Mapping[Tier, int] | None = None
    fingerprint: bytes = b""
    events: bool = False
    digests: bool = False

    # What follows from them.
    shared: dict[int, str] = field(init=False)
    """The arena of each kind that shares one, by index of kind."""
    sizes: dict[tuple[int, Tier], int] = field(init=False)
    """The capacity by index of kind; a kind that shares an arena has the arena's."""
    write_after: int = field(init=False)
    """Requests that must have resumed from a node before it is copied to HOST as one leaves; -1: it never is."""
    written: tuple[Tier, ...] = field(init=False)
    """Tiers that may be written to, nearest first."""
    write_back: bool = field(init=False)
    """Whether what is evicted is copied to HOST."""
    loads: tuple[int, ...] = field(init=False)
    """``min_load`` of each tier."""

    def __post_init__(self) -> None:
        policy_named(self.policy)
        if self.write_policy not in WRITE_POLICIES:
            raise ConfigError(
                f"write_policy={self.write_policy!r} is unknown; choose one of {', '.join(WRITE_POLICIES)}"
            )
        shared = _shared(self)
        sizes = _sizes(self, shared)
        host = any(tier is Tier.HOST for _, tier in sizes)
        written = {tier for _, tier in sizes} & {Tier.HOST, Tier.STORAGE}
        for tier in self.closed:
            if tier not in written:
                raise words.not_written(tier)
        after = {"write_through": 0, "write_through_selective": max(0, self.write_hits)}.get(self.write_policy, -1)
        follows = {
            "shared": shared,
            "sizes": sizes,
            "write_after": after if host else -1,
            "written": tuple(sorted(written - {*self.closed})),
            "write_back": host and self.write_policy == "write_back",
            "loads": tuple((self.min_load or {}).get(tier, 1) for tier in Tier),
        }
        for name, value in follows.items():
            object.__setattr__(self, name, value)

    @property
    def widths(self) -> list[int]:
        """Entries in a row of each kind's page table."""
        row = -(-self.max_length // self.page_size)
        return [2 if kind.rule == "recurrent" else row for kind in self.kinds]

    @property
    def device_size(self) -> int:
        """Tokens of the first kind on the device, which the adaptive policy measures its memory by."""
        return next(size for (_, tier), size in self.sizes.items() if tier is Tier.DEVICE)


def _shared(given: Settings) -> dict[int, str]:
    """The arena of each kind that shares one, by index of kind, checked."""
    names = [kind.name for kind in given.kinds]
    shared: dict[int, str] = {}
    for arena, members in (given.arenas or {}).items():
        if arena in names or (arena, Tier.DEVICE) not in given.capacity:
            raise ConfigError(
                f"arenas names {arena!r}: give it a name that no kind has, and capacity[{arena!r}, Tier.DEVICE]"
            )
        for name in members:
            if name not in names or names.index(name) in shared or (name, Tier.DEVICE) in given.capacity:
                raise ConfigError(
                    f"arenas[{arena!r}] names {name!r}: name kinds of {names}, each in one arena, and leave "
                    f"({name!r}, Tier.DEVICE) out of capacity"
                )
            shared[names.index(name)] = arena
    return shared


def _sizes(given: Settings, shared: Mapping[int, str]) -> dict[tuple[int, Tier], int]:
    """The capacity by index of kind, checked; a kind that shares an arena has the arena's."""
    if given.page_size < 1:
        raise ConfigError(f"page_size={given.page_size}: a page has at least 1 token")
    names = [kind.name for kind in given.kinds]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"kinds={names}: give at least one kind, each with a name of its own")
    sizes: dict[tuple[int, Tier], int] = {}
    for (name, tier), size in given.capacity.items():
        members = [k for k, arena in shared.items() if arena == name]
        if name not in names and not members:
            raise ConfigError(f"capacity names the kind {name!r}; the kinds are {names}")
        if size < 0:
            raise ConfigError(f"capacity[{name!r}, {Tier(tier).name}]={size}: give a number of tokens, at least 0")
        for k in members or [names.index(name)]:
            if (k, Tier(tier)) in sizes:
                raise ConfigError(
                    f"capacity gives {names[k]!r} room on {Tier(tier).name} by itself and in an arena: choose one"
                )
            sizes[k, Tier(tier)] = size
    for k, name in enumerate(names):
        if (k, Tier.DEVICE) not in sizes:
            raise ConfigError(f"capacity lacks ({name!r}, Tier.DEVICE): every kind needs room on the device")
        if (k, Tier.STORAGE) in sizes and (k, Tier.HOST) not in sizes:
            raise ConfigError(
                f"capacity has ({name!r}, Tier.STORAGE) and lacks ({name!r}, Tier.HOST): what a store holds comes up "
                "through the host"
            )
    return sizes
