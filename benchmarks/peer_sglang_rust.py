"""SGLang's Rust tree core, called as it is, without the Python adapter around it: a side of ``cache_core.py``.

Slots are SGLang's Python allocator's in the trace; the rows of the allocator itself are on the Python side.
"""

from __future__ import annotations

from core_tasks import POOL, Rows
from peer_sglang import tree_rows
from peer_sglang_load import CountingAllocator, rust_module

FULL = 0  # ComponentType.FULL


class Tree:
    """The extension's tree with the few calls that the rows make."""

    def __init__(self, page_size: int, pool=None) -> None:
        self.page_size = page_size
        self.pool = pool or CountingAllocator(POOL, page_size)
        self.core = core = rust_module()
        settings = core.TreeCoreInitParamsBinding(eviction_policy="lru", page_size=page_size, device="cpu")
        self.tree = core.RustUnifiedTreeCoreBinding(settings, [FULL])
        self.root = self.tree.root_node_handle()

    def match(self, tokens):
        found = self.tree.match_prefix(self.core.MatchParamsBinding(key=tokens))
        return found.device_prefix_len, found.last_device_node_id

    def slots(self, node):
        return self.tree.collect_full_device_indices(node, self.root)

    def insert(self, tokens, slots) -> int:
        whole = len(tokens) // self.page_size * self.page_size
        if whole < len(tokens):
            tokens = tokens[:whole]
        # prev_prefix_len: the caller frees duplicates itself, as it does with the Python core.
        return self.tree.insert(
            self.core.InsertParamsBinding(key=tokens, value=slots, prev_prefix_len=whole)
        ).prefix_len

    def lock(self, node):
        return node, self.tree.inc_lock_ref(node)

    def unlock(self, lock) -> None:
        node, held = lock
        params = self.core.DecLockRefParamsBinding(
            node_id=held.node_id,
            skipped_lock_components=held.skipped_lock_components,
            component_lock_uuids=held.component_lock_uuids,
            component_host_lock_uuids=held.component_host_lock_uuids,
        )
        self.tree.dec_lock_ref(node, params)

    def evict(self, count: int) -> None:
        """The steps that SGLang's controller drives, for one component and one tier."""
        tree, gone = self.tree, 0
        tree.evict_device_start(FULL, count)
        while gone < count:
            step = tree.evict_device_next_node(FULL, {FULL: gone})
            if step.node_id is None:
                if not step.made_progress:
                    break
                continue
            leaf = tree.evict_device_leaf(step.node_id)
            for values in leaf.new_device_frees.get(FULL, ()):
                self.pool.free_segment(values, start_pos=0)
            gone += leaf.tracker.get(FULL, 0)
        tree.evict_device_end(FULL)


ROWS: Rows = tree_rows(Tree)
