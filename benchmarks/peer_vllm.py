"""vLLM's ``KVCacheManager`` with prefix caching: a side of ``cache_core.py``.

A request's block hashes (SHA-256, vLLM's default) are made with the request, as in vLLM. They are in the trace and in
``insert``; ``match`` has them ready. Where a tree has a leaf vLLM has a cached block.
"""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from itertools import cycle

import torch
from core_tasks import (
    DECODE,
    DECODE_PREFIX,
    ENTRY,
    EXTEND,
    EXTEND_PREFIX,
    EXTEND_TOKENS,
    KEY,
    POOL,
    Rows,
    Skip,
    Task,
    cached,
    hot,
    leaf,
    prompts,
    resident_bytes,
    serials,
    tokens,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

HASH = get_hash_fn_by_name("sha256")
init_none_hash(HASH)
SAMPLING = SamplingParams(max_tokens=1)


class Manager:
    """A manager of one full-attention group, and requests for it."""

    def __init__(self, page_size: int, size: int = POOL, longest: int = 1 << 18) -> None:
        if page_size == 1:
            raise Skip("a block of one token is not vLLM's way")
        spec = FullAttentionSpec(block_size=page_size, num_kv_heads=1, head_size=1, dtype=torch.float16)
        config = KVCacheConfig(
            num_blocks=-(-size // page_size) + 1,  # one is the null block
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layers"], spec)],
        )
        self.page_size = page_size
        self.manager = KVCacheManager(
            config, max_model_len=longest, scheduler_block_size=page_size, hash_block_size=page_size
        )
        self.hasher = get_request_block_hasher(page_size, HASH)
        self.name = serials()

    def request(self, prompt) -> Request:
        return Request(str(self.name()), list(prompt), SAMPLING, None, block_hasher=self.hasher)

    def start(self, request: Request, length: int) -> int:
        """Blocks for the first ``length`` tokens; returns how many tokens were cached."""
        blocks, known, _ = self.manager.get_computed_blocks(request, length - 1)
        assert self.manager.allocate_slots(request, length - known, known, blocks) is not None
        request.num_computed_tokens = length
        return known

    def grow(self, request: Request, count: int) -> None:
        assert self.manager.allocate_slots(request, count) is not None
        request.num_computed_tokens += count

    def serve(self, prompt) -> int:
        request = self.request(prompt)
        known = self.start(request, len(prompt))
        self.manager.free(request)
        return known

    def fill(self, prompts_) -> None:
        for prompt in prompts_:
            self.serve(prompt)


def match(page_size: int, nodes: int) -> Task:
    if nodes > 1:
        raise Skip("blocks have no nodes; see the row of one node")
    manager = Manager(page_size)
    key = tokens(1, KEY)
    manager.serve(key)
    request = manager.request(key)

    def action(_):
        blocks, known, _ = manager.manager.get_computed_blocks(request, KEY)
        return blocks.get_block_ids(), known

    assert action(None)[1] == KEY
    return Task(action)


def insert(page_size: int, twice: bool) -> Task:
    """Hashing the new half, and caching its blocks as they are allocated."""
    if twice:
        raise Skip("blocks that were computed twice stay twice")
    manager, fresh = Manager(page_size), serials()
    head = tokens(1, KEY // 2)
    manager.serve(head + tokens(1, page_size))
    running = []

    def before():
        while running:
            manager.manager.free(running.pop())
        return list(head + tokens(fresh(), KEY // 2))

    def action(prompt):
        running.append(manager.request(prompt))
        manager.start(running[0], KEY)

    return Task(action, before)


def evict(page_size: int, leaves: int) -> Task:
    """Allocate a block where all are cached: one of them is evicted. All are cached anew when half are gone."""
    manager, fresh = Manager(page_size, leaves * page_size), serials()
    pool, chain, taken, gone = manager.manager.block_pool, 250, [], 0

    def fill():
        manager.fill(leaf(fresh(), chain * page_size) for _ in range(leaves // chain))

    def before():
        nonlocal gone
        pool.free_blocks(taken)
        taken.clear()
        gone += 1
        if gone > leaves // 2:
            fill()
            gone = 1

    fill()
    return Task(lambda _: taken.extend(pool.get_new_blocks(1)), before)


def take_and_give(page_size: int, count: int) -> Task:
    pool = Manager(page_size).manager.block_pool
    blocks = count // page_size
    return Task(lambda _: pool.free_blocks(pool.get_new_blocks(blocks)))


def give_one(page_size: int) -> Task:
    pool = Manager(page_size).manager.block_pool
    return Task(pool.free_blocks, lambda: pool.get_new_blocks(1))


def extend(page_size: int, table: bool) -> Task:
    if not table:
        raise Skip("vLLM's page tables are its workers'")
    manager, running = Manager(page_size), []

    def before():
        while running:
            manager.manager.free(running.pop())
        for i in range(EXTEND):
            running.append(manager.request(leaf(i, EXTEND_PREFIX + EXTEND_TOKENS)))
            manager.start(running[-1], EXTEND_PREFIX)

    def action(_):
        for request in running:
            manager.grow(request, EXTEND_TOKENS)

    return Task(action, before)


def decode(page_size: int, table: bool) -> Task:
    if not table:
        raise Skip("vLLM's page tables are its workers'")
    manager = Manager(page_size)
    running = [manager.request(leaf(i, DECODE_PREFIX + i)) for i in range(DECODE)]
    for request in running:
        manager.start(request, request.num_tokens)

    def before():
        for request in running:
            request.append_output_token_ids(7)  # hashes a block when it is full

    def action(_):
        for request in running:
            manager.grow(request, 1)

    return Task(action, before)


def trace(path: str, page_size: int, slots: bool = True, names: bool = False, frozen: bool = True) -> Task:
    """Hash, look up, allocate (which evicts) and free, a request at a time. Hashing is how vLLM looks things up."""
    del slots, names
    if not frozen:
        raise Skip("vLLM keeps no tokens")
    Manager(page_size)  # or Skip
    keys = [list(prompt) for prompt in prompts(path)]
    facts: dict = {"requests": len(keys)}

    def action(manager):
        hit = sum(map(manager.serve, keys))
        facts["hit_rate"] = hit / sum(map(len, keys))

    return Task(action, lambda: Manager(page_size), once=True, facts=facts)


def scaling(page_size: int, what: str, tokens_cached: int) -> Task:
    if what != "match":
        raise Skip("a hash map and a list of blocks: neither depends on what is cached")
    manager = Manager(page_size, tokens_cached + POOL)
    keys = cached(tokens_cached)
    manager.fill(keys)
    chosen = cycle([manager.request(key) for key in hot(keys)]).__next__
    return Task(lambda request: manager.manager.get_computed_blocks(request, ENTRY)[0].get_block_ids(), chosen)


def memory(page_size: int, tokens_cached: int, entry: int) -> Task:
    """Resident bytes that the cached tokens took; a block's own object is there from the start."""
    manager = Manager(page_size)
    begin = resident_bytes()
    manager.fill(leaf(i, entry) for i in range(tokens_cached // entry))
    facts = {"bytes": resident_bytes() - begin, "nodes": tokens_cached // page_size}
    return Task(lambda _: manager, once=True, facts=facts)


ROWS: Rows = {
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
