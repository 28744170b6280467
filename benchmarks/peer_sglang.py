"""SGLang's Python ``RadixCache`` and its slot allocators: a side of ``cache_core.py``."""

from __future__ import annotations

from itertools import cycle

import torch
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
from peer_sglang_load import CountingAllocator, allocator, key_of, python_module, take


class Tree:
    """A ``RadixCache`` with the few calls that the rows make, as SGLang's own callers make them."""

    def __init__(self, page_size: int, pool=None) -> None:
        self.page_size = page_size
        self.pool = pool or CountingAllocator(POOL, page_size)
        params = python_module("cache_init_params").CacheInitParams
        self.base = python_module("base_prefix_cache")
        self.cache = python_module("radix_cache").RadixCache(
            params(disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=self.pool, page_size=page_size)
        )

    def match(self, tokens):
        found = self.cache.match_prefix(self.base.MatchPrefixParams(key=key_of(tokens, 1)))
        return found.device_prefix_len, found.last_device_node

    def slots(self, node):
        return self.cache.path_device_indices(node)

    def insert(self, tokens, slots) -> int:
        return self.cache.insert(self.base.InsertParams(key=key_of(tokens, self.page_size), value=slots)).prefix_len

    def lock(self, node):
        self.cache.inc_lock_ref(node)
        return node

    def unlock(self, node) -> None:
        self.cache.dec_lock_ref(node)

    def evict(self, count: int) -> None:
        self.cache.evict(self.base.EvictParams(num_tokens=count))


def put(tree, keys) -> None:
    """Fill a tree with keys of whole pages."""
    for tokens_ in keys:
        tree.insert(tokens_, torch.arange(len(tokens_), dtype=torch.int64))


# ---- rows over a tree, for both of SGLang's cores -------------------------------------------------------------------


def match(tree, nodes: int) -> Task:
    key = tokens(1, KEY)
    put(tree, [key, *branches(key, nodes, tree.page_size)])

    def action(_):
        _, node = tree.match(key)
        return tree.slots(node)

    assert len(action(None)) == KEY
    return Task(action)


def insert(tree, twice: bool) -> Task:
    """Half of the key is in the tree. The slots that ``twice`` exposes as duplicates are not freed here."""
    head, slots, fresh = tokens(1, KEY // 2), torch.arange(KEY, dtype=torch.int64), serials()
    tree.insert(head, slots[: KEY // 2])

    def before():
        if twice:
            tree.evict(KEY)  # all there is
            tree.insert(head, slots[: KEY // 2])
        else:
            tree.evict(1)  # the tail of the sample before; of the first, the head
            tree.insert(head, slots[: KEY // 2])
        return head + tokens(fresh(), KEY // 2)

    def action(key):
        assert tree.insert(key, slots) == KEY // 2

    return Task(action, before)


def evict(tree, leaves: int) -> Task:
    """There are ``leaves`` leaves again before each sample."""
    put(tree, (leaf(i, tree.page_size) for i in range(leaves - 1)))
    fresh = serials(leaves)
    return Task(lambda _: tree.evict(1), lambda: put(tree, [leaf(fresh(), tree.page_size)]))


def trace(make, path: str, page_size: int, slots: bool = True, names: bool = False, frozen: bool = True) -> Task:
    """What SGLang does for a request, one at a time: match and lock, evict, allocate, write the row of the page table,
    and when it is finished insert what the row has and unlock. Without ``slots`` nothing is allocated."""
    if names:
        raise Skip("SGLang hashes where a storage backend asks for it; see vLLM")
    if not frozen:
        raise Skip("SGLang copies tokens in any case")
    keys = prompts(path)
    row = torch.zeros(max(map(len, keys)), dtype=torch.int32)  # of ReqToTokenPool.req_to_token
    facts = {"requests": len(keys)}

    def before():
        return make(page_size, allocator(POOL, page_size) if slots else CountingAllocator(POOL, page_size))

    def action(tree):
        pool, hit = tree.pool, 0
        for key in keys:
            length = len(key)
            known, node = tree.match(key)
            held = tree.slots(node)
            lock = tree.lock(node)
            hit += known
            short = length - known + page_size - pool.available_size()
            if short > 0:
                tree.evict(short)
            row[:known] = held
            row[known:length] = take(pool, held, known, length)
            whole = length // page_size * page_size
            shared = tree.insert(key, row[:whole].to(torch.int64, copy=True))
            if shared > known:
                pool.free_segment(row[known:shared], start_pos=known)
            if whole < length:
                pool.free_segment(row[whole:length].to(torch.int64), start_pos=whole)
            tree.unlock(lock)
        facts["hit_rate"] = hit / sum(map(len, keys))

    return Task(action, before, once=True, facts=facts)


def scaling(tree, what: str, tokens_cached: int) -> Task:
    keys = cached(tokens_cached)
    put(tree, keys)
    if what == "evict":
        fresh = serials(len(keys))
        return Task(lambda _: tree.evict(1), lambda: put(tree, [leaf(fresh(), ENTRY)]))
    chosen, fresh = cycle(hot(keys)).__next__, serials()
    if what == "match":
        return Task(lambda key: tree.slots(tree.match(key)[1]), chosen)
    slots = torch.arange(ENTRY, dtype=torch.int64)
    half = ENTRY // 2
    return Task(lambda key: tree.insert(key, slots), lambda: chosen()[:half] + tokens(fresh(), half))


def memory(tree, tokens_cached: int, entry: int) -> Task:
    """Resident bytes that the cached tokens took."""
    begin = resident_bytes()
    # Each entry's slots are a tensor of its own, as they are when requests come one by one.
    for i in range(tokens_cached // entry):
        tree.insert(leaf(i, entry), torch.arange(entry, dtype=torch.int64))
    facts = {"bytes": resident_bytes() - begin, "nodes": tokens_cached // entry}
    return Task(lambda _: tree, once=True, facts=facts)


def tree_rows(make) -> Rows:
    """The rows of a core, given ``make(page_size, pool)``."""
    return {
        "match": lambda page_size, nodes: match(make(page_size), nodes),
        "insert": lambda page_size, twice: insert(make(page_size), twice),
        "evict": lambda page_size, leaves: evict(make(page_size), leaves),
        "trace": lambda **what: trace(make, **what),
        "scaling": lambda page_size, **what: scaling(make(page_size), **what),
        "memory": lambda page_size, **sizes: memory(make(page_size), **sizes),
    }


# ---- rows of the allocator ------------------------------------------------------------------------------------------


def take_and_give(page_size: int, count: int) -> Task:
    pool = allocator(POOL, page_size)

    def action(_):
        pool.free_segment(pool.alloc(count), start_pos=0)

    return Task(action)


def give_one(page_size: int) -> Task:
    """One slot, or one page where pages are longer."""
    pool = allocator(POOL, page_size)
    return Task(lambda slots: pool.free_segment(slots, start_pos=0), lambda: pool.alloc(page_size))


def extend(page_size: int, table: bool) -> Task:
    """Slots, and with ``table`` what ``write_cache_indices`` does on the CPU with those of the new tokens."""
    pool = allocator(POOL, page_size)
    before = torch.full((EXTEND,), EXTEND_PREFIX)
    after = before + EXTEND_TOKENS
    last = torch.arange(1, EXTEND + 1) * EXTEND_PREFIX - 1  # each prefix ends at the end of a page
    rows, held = page_table(EXTEND, EXTEND_PREFIX + EXTEND_TOKENS), []

    def action(_):
        if page_size == 1:
            slots = pool.alloc(EXTEND * EXTEND_TOKENS)
        else:
            slots = pool.alloc_extend(before, before, after, after, last, EXTEND * EXTEND_TOKENS)
        held.append(slots)
        if table:
            for i in range(EXTEND):
                begin, end = before[i].item(), after[i].item()
                rows[i + 1, begin:end] = slots[i * EXTEND_TOKENS : (i + 1) * EXTEND_TOKENS]

    def give_back():
        while held:
            pool.free_segment(held.pop(), start_pos=0)

    return Task(action, give_back)


def page_table(requests: int, longest: int) -> torch.Tensor:
    """``ReqToTokenPool.req_to_token``: row 0 is padding."""
    return torch.zeros((requests + 1, longest), dtype=torch.int32)


def decode(page_size: int, table: bool) -> Task:
    """Lengths of all phases within a page; the slots stay taken, as they do while requests run.

    ``table``: also the rest of ``alloc_for_decode`` on tensors: the last slots are read from the page table, the new
    ones written to it. (Its loop over the requests, in Python, is left out.)
    """
    pool = allocator(POOL, page_size)
    lengths = torch.arange(DECODE) + DECODE_PREFIX
    last = pool.alloc(DECODE * page_size)[::page_size] + (lengths - 1) % page_size
    rows, indices = page_table(DECODE, DECODE_PREFIX + DECODE + DECODE_ROOM), torch.arange(1, DECODE + 1)
    rows[indices, lengths - 1] = last.to(torch.int32)

    def action(_):
        nonlocal last
        if page_size == 1:
            slots = pool.alloc(DECODE)
        else:
            if table:
                last = rows[indices, lengths - 2]
            slots = last = pool.alloc_decode(lengths, lengths, last)
        if table:
            rows[indices, lengths - 1] = slots.to(torch.int32)
        return slots

    def before():
        nonlocal pool, last
        lengths.add_(1 if lengths[-1] < rows.shape[1] else 1 - DECODE_ROOM)
        if pool.available_size() < 2 * DECODE * page_size:
            pool = allocator(POOL, page_size)

    return Task(action, before)


ROWS: Rows = tree_rows(Tree) | {
    "slots": take_and_give,
    "give one": give_one,
    "extend": extend,
    "decode": decode,
}
