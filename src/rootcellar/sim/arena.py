"""Sharing one buffer among kinds: how layers are grouped so that a page of every kind takes the same bytes.

Kinds differ in how many layers they have, so a page of each would differ in size. Their layers are therefore cut into
groups of at most ``g`` layers. Each group becomes a kind of its own, with its own page table, and a page of any group
is a page of ``g`` layers: layer ``i`` of every group lies in buffer ``i`` of the arena. A group with fewer than ``g``
layers leaves the rest of its pages unused. (vLLM's hybrid KV cache manager groups layers alike; Jenga, by Zhang et
al., 2025, generalises it to sizes that differ.)

    Gemma 3, 27B: 10 full and 52 window layers, g = 5:    full.0 | full.1 | window.0 ... window.10  (room for 65)
    Llama 4 Scout: 12 full and 36 chunk layers, g = 12:   full | chunk.0 | chunk.1 | chunk.2
    gpt-oss, 120B: 18 full and 18 window layers, g = 18:  full | window
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rootcellar.cache.kind import Kind
from rootcellar.sim.sizing import (
    Cost,
    Division,
    Rules,
    split_pages,
    state_bytes,
    state_pages,
)

ARENA = "arena"
"""What the shared allocator is called, in capacities and divisions."""
MOST_GROUPS = 16
"""More groups than this waste less room, but each costs a page table and a branch of every verb."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """Kinds cut so that those named in ``members`` share pages of ``layers`` layers each."""

    kinds: tuple[Kind, ...]
    members: tuple[str, ...]
    layers: int


def group(kinds: Sequence[Kind], layer_bytes: Mapping[str, int]) -> Grouping | None:
    """Cut ``kinds`` for an arena; None when there are no two to share one, or their pages differ by layer.

    ``layer_bytes``: by kind, the bytes of a page in one layer. Recurrent kinds stay apart: a state is no page. The
    group size is the one that leaves the least room unused with at most ``MOST_GROUPS`` groups, the largest of equals;
    what full kinds leave unused counts first, since long requests are made of their pages.
    """
    shared = [kind for kind in kinds if kind.rule != "recurrent"]
    if len(shared) < 2 or len({layer_bytes[kind.name] for kind in shared}) > 1:
        return None

    def groups(g: int) -> int:
        return sum(-(-len(kind.layers) // g) for kind in shared)

    def room(g: int) -> tuple[int, int]:
        fulls = sum(-(-len(kind.layers) // g) for kind in shared if kind.rule == "full")
        return fulls * g, groups(g) * g

    most = max(MOST_GROUPS, len(shared))
    longest = max(len(kind.layers) for kind in shared)
    g = min((g for g in range(1, longest + 1) if groups(g) <= most), key=lambda g: (*room(g), -g))
    cut: list[Kind] = []
    members: list[str] = []
    for kind in kinds:
        parts = _cut(kind, -(-len(kind.layers) // g)) if kind in shared else [kind]
        cut += parts
        members += [part.name for part in parts if kind in shared]
    return Grouping(tuple(cut), tuple(members), g)


def _cut(kind: Kind, parts: int) -> list[Kind]:
    """A kind as ``parts`` kinds of nearly equally many layers."""
    if parts == 1:
        return [kind]
    return [replace(kind, name=f"{kind.name}.{i}", layers=kind.layers[i::parts]) for i in range(parts)]


def divide_shared(costs: Sequence[Cost], members: Sequence[str], rules: Rules, budget: int) -> Division | None:
    """The largest arena (and states) that fit into ``budget`` bytes; None when not one page of each kind does.

    ``costs`` are those of the cut kinds; a page of a member takes the arena's page. ``Division.pages`` counts the
    arena's under ``ARENA``; ``tokens`` is the longest request that the arena holds (:func:`longest_request`): kinds
    that do not need all of it leave the room to those that do. ``max_total_tokens`` takes the pages that split pools
    would take for it, and no more.
    """
    sharing = [cost for cost in costs if cost.kind.name in members]
    page = max(cost.page_bytes for cost in sharing)
    alike = [Cost(cost.kind, page) for cost in sharing]
    wanted = len(sharing)
    if rules.max_total_tokens is not None:
        wanted = sum(split_pages(cost, alike, rules, rules.max_total_tokens // rules.page_size) for cost in alike)
    states = state_pages(costs, rules, budget, page * (wanted + 1))
    if states is None or wanted < len(sharing):
        return None
    pages = wanted
    if rules.max_total_tokens is None:
        pages = (budget - state_bytes(costs, states)) // page - 1

    tokens = longest_request([cost.kind for cost in sharing], pages, rules)
    if rules.max_total_tokens is not None:
        tokens = min(tokens, rules.max_total_tokens // rules.page_size * rules.page_size)
    counts = {ARENA: pages} | {cost.kind.name: states for cost in costs if cost.recurrent}
    return Division(counts, tokens, (pages + 1) * page + state_bytes(costs, states))


def longest_request(kinds: Sequence[Kind], pages: int, rules: Rules) -> int:
    """Tokens, in whole pages, to which one request can grow in an arena of ``pages`` that it has for itself.

    It is computed ``rules.inflight`` tokens at a time: while tokens ``[m, n)`` are, a kind holds ``[start(m), n)``.
    Exact, and walked step by step, because what a chunked kind holds falls at each chunk's end: all steps before the
    answer fit. O(pages of the answer).
    """
    size = rules.page_size
    step = -(-rules.inflight // size)
    done = 0
    while True:
        held = sum(done - kind.start(done * size) // size for kind in kinds)
        more = (pages - held) // len(kinds)
        if more < step:
            return (done + more) * size
        done += step
