"""rootcellar's cache core through its public verbs, native or Python: a side of ``cache_core.py``.

``ROOTCELLAR_NO_NATIVE=1`` makes it the Python twin. A row times at least the work that the peers' row times.
"""

from __future__ import annotations

from array import array
from itertools import cycle

from core_tasks import (
    DECODE,
    DECODE_PREFIX,
    DECODE_ROOM,
    ENTRY,
    EXTEND,
    EXTEND_PREFIX,
    EXTEND_TOKENS,
    KEY,
    POOL,
    Rows,
    Skip,
    Task,
    branches,
    cached,
    hot,
    leaf,
    prompts,
    resident_bytes,
    serials,
    tokens,
)

from rootcellar.cache import CORE, Key, RadixCache, Tier, full


def core(
    page_size: int, size: int = POOL, *, leases: int = 256, length: int = KEY, digests: bool = False
) -> RadixCache:
    """A cache of one kind on one tier."""
    size = -(-size // page_size) * page_size
    return RadixCache(
        [full("full")],
        page_size=page_size,
        capacity={("full", Tier.DEVICE): size},
        max_leases=leases,
        max_length=length,
        digests=digests,
    )


def put(cache: RadixCache, keys) -> None:
    """Serve requests that ask for these keys, one by one."""
    for tokens_ in keys:
        key = Key(tokens_)
        lease = start(cache, key)
        cache.commit(lease, key)
        cache.close(lease)


def start(cache: RadixCache, key: Key):
    """A lease with slots for all of a key."""
    lease = cache.open(cache.match(key))
    assert lease is not None
    assert cache.grow(lease, len(key) - lease.length)
    return lease


def match(page_size: int, nodes: int) -> Task:
    cache = core(page_size)
    key = Key(tokens(1, KEY))
    put(cache, [key.tokens, *(branches(tokens(1, KEY), nodes, page_size))])
    # A branch at each cut: without them, the path's own nodes are left.
    assert cache.stats().nodes - (nodes - 1) == nodes
    assert len(cache.slots(cache.match(key), "full")) == KEY
    return Task(lambda _: cache.slots(cache.match(key), "full"), facts={"bytes": 4 * KEY})


def insert(page_size: int, twice: bool) -> Task:
    """Commit a key of which half is in the tree: matched by the request before, or, ``twice``, computed again by it.

    In the second case the duplicates are freed too.
    """
    cache, fresh, open_leases = core(page_size), serials(), []
    head = tokens(1, KEY // 2)

    def before():
        while open_leases:
            cache.close(open_leases.pop(), keep=False)
        key = Key(head + tokens(fresh(), KEY // 2))
        first = start(cache, key[: KEY // 2])
        if not twice:
            cache.commit(first, key[: KEY // 2])
        lease = start(cache, key)
        if twice:
            cache.commit(first, key[: KEY // 2])
        open_leases.extend([first, lease])
        return lease, key

    return Task(lambda given: cache.commit(*given), before)


def evict(page_size: int, leaves: int, size: int | None = None) -> Task:
    """Make room for a leaf's tokens in a full cache of such leaves; one is put back before each sample."""
    size = size or page_size
    cache = core(page_size, leaves * size, length=size)
    put(cache, (leaf(i, size) for i in range(leaves)))
    fresh = serials(leaves)

    def action(_):
        assert cache.make_room("full", size)

    action(None)
    return Task(action, lambda: put(cache, [leaf(fresh(), size)]))


def take_and_give(page_size: int, count: int) -> Task:
    """Open, grow, close: the slots come and go with a lease."""
    cache = core(page_size)
    put(cache, [leaf(0, page_size)])
    hit = cache.match(Key([]))

    def action(_):
        lease = cache.open(hit)
        cache.grow(lease, count)
        cache.close(lease)

    return Task(action)


def give_one(page_size: int) -> Task:
    """Close a lease that owns one page, in a cache that holds something."""
    cache = core(page_size)
    put(cache, [leaf(0, page_size)])

    def before():
        lease = cache.open(cache.match(Key([])))
        cache.grow(lease, page_size)
        return lease

    return Task(cache.close, before)


def running(page_size: int, lengths: list[int], room: int):
    """A cache with a lease of each length, and the means to get the leases anew when a row cannot grow by ``room``."""
    cache = core(page_size, leases=len(lengths), length=max(lengths) + room)
    leases = []

    def renew():
        while leases:
            cache.close(leases.pop())
        for i, length in enumerate(lengths):
            lease = cache.open(cache.match(Key([i])))
            cache.grow(lease, length)
            leases.append(lease)
        return leases

    return cache, renew


def extend(page_size: int, table: bool) -> Task:
    del table  # is always written
    cache, renew = running(page_size, [EXTEND_PREFIX] * EXTEND, EXTEND_TOKENS)
    return Task(lambda leases: cache.grow_many(leases, EXTEND_TOKENS), renew)


def decode(page_size: int, table: bool) -> Task:
    del table  # is always written
    cache, renew = running(page_size, [DECODE_PREFIX + i for i in range(DECODE)], DECODE_ROOM)
    leases, steps = renew(), 0

    def before():
        nonlocal steps
        steps += 1
        if steps > DECODE_ROOM:
            renew()
            steps = 1
        return leases

    return Task(cache.grow_many, before)


def trace(path: str, page_size: int, slots: bool = True, names: bool = False, frozen: bool = True) -> Task:
    """Match, open, grow (which evicts), commit and close, a request at a time.

    ``names``: every page of every prompt has its digest when the prompt is committed. Slots are always allocated: the
    core has no other way. ``frozen``: the prompts never change, so the tree may refer to them; else it copies.
    """
    del slots
    keys = [Key(prompt.tolist() if frozen else prompt) for prompt in prompts(path)]
    longest = max(map(len, keys))
    facts: dict = {"requests": len(keys)}

    def before():
        return core(page_size, leases=1, length=longest, digests=names)

    def action(cache):
        for key in keys:
            lease = cache.open(cache.match(key))
            cache.grow(lease, len(key) - lease.length)
            cache.commit(lease, key)
            cache.close(lease)
        facts["hit_rate"] = cache.stats().hit_rate

    return Task(action, before, once=True, facts=facts)


def scaling(page_size: int, what: str, tokens_cached: int) -> Task:
    if what == "evict":
        return evict(page_size, tokens_cached // ENTRY, ENTRY)
    keys = cached(tokens_cached)
    cache = core(page_size, tokens_cached + POOL, length=ENTRY)
    put(cache, keys)
    chosen, fresh, leases = cycle([Key(key) for key in hot(keys)]).__next__, serials(), []
    if what == "match":
        return Task(lambda key: cache.slots(cache.match(key), "full"), chosen)

    def before():
        while leases:
            cache.close(leases.pop(), keep=False)
        key = Key(array("q", chosen().tokens[: ENTRY // 2]) + tokens(fresh(), ENTRY // 2))
        leases.append(start(cache, key))
        return leases[0], key

    return Task(lambda given: cache.commit(*given), before)


def memory(page_size: int, tokens_cached: int, entry: int) -> Task:
    """Resident bytes that the cached tokens took."""
    cache = core(page_size, leases=1, length=entry)
    begin = resident_bytes()
    put(cache, (leaf(i, entry) for i in range(tokens_cached // entry)))
    facts = {"bytes": resident_bytes() - begin, "nodes": cache.stats().nodes, "own": cache.memory_bytes()}
    return Task(lambda _: cache, once=True, facts=facts)


def native() -> Task:
    """Nothing to measure: skipped where the Python core is what there is."""
    if CORE != "native":
        raise Skip("the native core is not built")
    return Task(lambda _: None)


def floor(page_size: int, what: str, size: int) -> Task:
    """What no core can go below: comparing and copying so many bytes, warm, and calling something that does nothing.

    ``bytes`` compare with memcmp and a ``bytearray``'s whole slice is assigned with memcpy, both with next to no call.
    """
    del page_size
    left = bytes(size)
    if what == "memcmp":
        right = bytes(bytearray(size))  # equal, and elsewhere
        return Task(lambda _: left == right, inner=20)
    if what == "memcpy":
        target = memoryview(bytearray(size))

        def copy(_):
            target[:] = left

        return Task(copy, inner=20)
    return Task(lambda _: None, inner=100)


ROWS: Rows = {
    "native": native,
    "floor": floor,
    "match": match,
    "insert": insert,
    "evict": evict,
    "slots": take_and_give,
    "give one": give_one,
    "extend": extend,
    "decode": decode,
    "trace": trace,
    "scaling": scaling,
    "memory": memory,
}
