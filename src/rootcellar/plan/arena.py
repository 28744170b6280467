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

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from rootcellar.cache.kind import Kind

UNUSED = 0.05
"""The part of a page's room that may stay unused, for the sake of fewer groups."""
MOST_GROUPS = 16
"""Most groups, whatever stays unused: each costs a page table and a branch of every verb."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """Kinds cut so that those named in ``members`` share pages of ``layers`` layers each."""

    kinds: tuple[Kind, ...]
    members: tuple[str, ...]
    layers: int


def group(kinds: Sequence[Kind], layouts: Mapping[str, Hashable]) -> Grouping | None:
    """Cut ``kinds`` for an arena; None when there are no two to share one, or their pages differ.

    ``layouts``: by kind, how a page's bytes lie in one layer. Recurrent kinds stay apart: a state is no page. There are
    as few groups as leave at most ``UNUSED`` of the room unused, of all pages and of those of full kinds, which long
    requests are made of; where there is no such choice, the one that leaves least.
    """
    shared = [kind for kind in kinds if kind.rule != "recurrent"]
    if len(shared) < 2 or len({layouts[kind.name] for kind in shared}) > 1:
        return None

    fulls = [len(kind.layers) for kind in shared if kind.rule == "full"]
    counts = [len(kind.layers) for kind in shared]

    def unused(g: int) -> float:
        """The larger part of the pages' room that no layer uses: in those of full kinds, or in all."""
        return max(sum(-n % g for n in some) / sum(some) for some in (fulls or counts, counts))

    def groups(g: int) -> int:
        return sum(-(-n // g) for n in counts)

    sizes = [g for g in range(1, max(counts) + 1) if groups(g) <= max(MOST_GROUPS, len(counts))]
    g = min(sizes, key=lambda g: (max(unused(g), UNUSED), groups(g), unused(g)))
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
