"""What a cache is made with, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.order import policy_named
from rootcellar.errors import ConfigError

Capacity = Mapping[tuple[str, Tier], int]
WRITE_POLICIES = ("write_through", "write_through_selective", "write_back")


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments of ``RadixCache``, by index of kind where they name kinds.

    ``sizes``: tokens by (kind, tier); ``shared``: the arena of each kind that shares one; ``write_hits``: hits before a
    node is written through to HOST, None when nothing is.
    """

    kinds: tuple[Kind, ...]
    page_size: int
    sizes: dict[tuple[int, Tier], int]
    shared: dict[int, str]
    max_leases: int
    max_length: int
    policy: str
    reuse: bool
    write_hits: int | None
    write_back: bool
    min_load: dict[Tier, int]
    fingerprint: bytes
    events: bool
    digests: bool

    @property
    def widths(self) -> list[int]:
        """Entries in a row of each kind's page table."""
        row = -(-self.max_length // self.page_size)
        return [2 if kind.rule == "recurrent" else row for kind in self.kinds]


def settings(
    kinds: Sequence[Kind],
    *,
    page_size: int = 16,
    capacity: Capacity,
    arenas: Mapping[str, Sequence[str]] | None = None,
    max_leases: int = 256,
    max_length: int = 32768,
    policy: str = "lru",
    reuse: bool = True,
    write_policy: str = "write_through",
    write_hits: int = 2,
    min_load: Mapping[Tier, int] | None = None,
    fingerprint: bytes = b"",
    events: bool = False,
    digests: bool = False,
) -> Settings:
    """The arguments of ``RadixCache``, checked. Raises ``ConfigError`` naming the one that is wrong."""
    kinds = tuple(kinds)
    shared = _shared(kinds, arenas or {}, capacity)
    sizes = _sizes(kinds, page_size, capacity, shared)
    policy_named(policy)
    if write_policy not in WRITE_POLICIES:
        raise ConfigError(f"write_policy={write_policy!r} is unknown; choose one of {', '.join(WRITE_POLICIES)}")
    host = any(tier is Tier.HOST for _, tier in sizes)
    hits = {"write_through": 0, "write_through_selective": max(0, write_hits)}.get(write_policy) if host else None
    return Settings(
        kinds=kinds,
        page_size=page_size,
        sizes=sizes,
        shared=shared,
        max_leases=max_leases,
        max_length=max_length,
        policy=policy,
        reuse=reuse,
        write_hits=hits,
        write_back=host and write_policy == "write_back",
        min_load=dict(min_load or {}),
        fingerprint=fingerprint,
        events=events,
        digests=digests,
    )


def _shared(kinds: tuple[Kind, ...], arenas: Mapping[str, Sequence[str]], capacity: Capacity) -> dict[int, str]:
    """The arena of each kind that shares one, by index of kind, checked."""
    names = [kind.name for kind in kinds]
    shared: dict[int, str] = {}
    for arena, members in arenas.items():
        if arena in names or (arena, Tier.DEVICE) not in capacity:
            raise ConfigError(
                f"arenas names {arena!r}: give it a name that no kind has, and capacity[{arena!r}, Tier.DEVICE]"
            )
        for name in members:
            if name not in names or names.index(name) in shared or (name, Tier.DEVICE) in capacity:
                raise ConfigError(
                    f"arenas[{arena!r}] names {name!r}: name kinds of {names}, each in one arena, and leave "
                    f"({name!r}, Tier.DEVICE) out of capacity"
                )
            shared[names.index(name)] = arena
    return shared


def _sizes(
    kinds: tuple[Kind, ...], page_size: int, capacity: Capacity, shared: Mapping[int, str]
) -> dict[tuple[int, Tier], int]:
    """The capacity by index of kind, checked; a kind that shares an arena has the arena's."""
    if page_size < 1:
        raise ConfigError(f"page_size={page_size}: a page has at least 1 token")
    names = [kind.name for kind in kinds]
    if not kinds or len(set(names)) != len(names):
        raise ConfigError(f"kinds={names}: give at least one kind, each with a name of its own")
    sizes: dict[tuple[int, Tier], int] = {}
    for (name, tier), size in capacity.items():
        members = [k for k, arena in shared.items() if arena == name]
        if name not in names and not (members and tier == Tier.DEVICE):
            raise ConfigError(f"capacity names the kind {name!r}; the kinds are {names}")
        if size < 0:
            raise ConfigError(f"capacity[{name!r}, {Tier(tier).name}]={size}: give a number of tokens, at least 0")
        for k in members or [names.index(name)]:
            sizes[k, Tier(tier)] = size
    for k, tier in list(sizes):
        if tier is Tier.STORAGE and (k, Tier.HOST) not in sizes:
            raise ConfigError(
                f"capacity has ({names[k]!r}, Tier.STORAGE) and lacks ({names[k]!r}, Tier.HOST): what a store holds "
                "comes up through the host"
            )
    for k, name in enumerate(names):
        if (k, Tier.DEVICE) not in sizes:
            raise ConfigError(f"capacity lacks ({name!r}, Tier.DEVICE): every kind needs room on the device")
    return sizes
