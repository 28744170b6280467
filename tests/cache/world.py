"""A small world around a cache: requests, page contents and a brute-force answer for everything the cache says.

One class, two drivers: hypothesis (``test_fuzz.py``) and a seeded loop (``fuzz.py``) call the same actions.
Every page's content is simulated as the hash of the token prefix that was computed into it, so a page shared with,
or left to, the wrong request is noticed as soon as it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from wishes import control

from rootcellar.cache import (
    Done,
    Failed,
    Found,
    Hit,
    Key,
    Kind,
    Lease,
    Lost,
    Manifest,
    Move,
    Tier,
    chunked_local,
    full,
    recurrent,
    sliding_window,
)
from rootcellar.cache.radix import PyRadixCache
from rootcellar.errors import CacheBusy

Pick = Callable[[int], int]  # n -> an int in [0, n)

POLICIES = ("lru", "lfu", "fifo", "filo", "mru", "slru", "priority", "adaptive", "adaptive")
KIND_MIXES: tuple[tuple[Kind, ...], ...] = (
    (full("full"),),
    (full("full"), sliding_window("window", window=5)),
    (full("full"), sliding_window("narrow", window=2), sliding_window("wide", window=9)),
    (full("full"), chunked_local("chunk", chunk=6)),
    (full("full"), recurrent("state")),
    (sliding_window("window", window=4),),
    (full("full"), sliding_window("one", window=1), chunked_local("chunk", chunk=4), recurrent("state")),
    (recurrent("state"),),
    (full("a"), full("b"), sliding_window("window", window=3)),
    (sliding_window("window", window=6), recurrent("state")),
)
NAMESPACES = ("", "lora")
MAX_LENGTH = 48
WAYS = {(Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DEVICE), (Tier.HOST, Tier.STORAGE), (Tier.STORAGE, Tier.HOST),
        (Tier.PEER, Tier.HOST), (Tier.PEER, Tier.DEVICE)}  # fmt: skip


@dataclass
class Running:
    """A request of the world: its lease, its tokens and how many of them are computed."""

    lease: Lease
    tokens: list[int]
    computed: int
    committed: int = 0
    memory: NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_LENGTH, np.int64))

    def key(self, length: int) -> Key:
        """The first tokens: in memory of their own, in memory that will be written, or in memory that only grows."""
        tokens: Any = self.tokens[:length]
        if self.lease.serial % 3 == 1:
            tokens = np.array(tokens, np.int64)
        elif self.lease.serial % 3 == 2:
            self.memory[:length] = tokens
            tokens = self.memory[:length]
            tokens.flags.writeable = False
        return Key(tokens, self.lease.namespace)


@dataclass
class Copying:
    """A move that was dispatched: a source on DEVICE was read then, any other is read when it is done."""

    move: Move
    read: list[int | None]


@dataclass
class World:
    pick: Pick
    make: Callable[..., Any] = PyRadixCache
    search: bool = True  # whether each match is compared with brute force
    cache: Any = field(init=False)
    running: list[Running] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    prompts: list[tuple[str, list[int]]] = field(default_factory=list)
    copying: list[Copying] = field(default_factory=list)
    named: dict[tuple[str, bytes], int] = field(default_factory=dict)  # content by (kind, digest)
    offers: list[Manifest] = field(default_factory=list)
    prefetched: set[int] = field(default_factory=set)  # moves
    stored: set[tuple[str, bytes]] = field(default_factory=set)  # what a store holds, by (kind, digest)

    def __post_init__(self) -> None:
        pick = self.pick
        kinds = KIND_MIXES[pick(len(KIND_MIXES))]
        self.page = (1, 2, 4)[pick(3)]
        capacity = {}
        arenas = {}
        tiers = [tier for tier in (Tier.HOST, Tier.STORAGE, Tier.PEER) if pick(2)]
        if Tier.STORAGE in tiers and Tier.HOST not in tiers:
            tiers.append(Tier.HOST)
        for kind in kinds:
            size = 3 + pick(8) if kind.rule == "recurrent" else 8 + pick(90)
            capacity[kind.name, Tier.DEVICE] = size
            for tier in tiers:
                capacity[kind.name, tier] = size * (1 + pick(8)) // 3
        if len(kinds) > 1 and pick(2):  # all but perhaps the last share their device pages
            arenas["arena"] = [kind.name for kind in kinds[: len(kinds) - pick(2) * (len(kinds) > 2)]]
            sizes = [capacity.pop((name, Tier.DEVICE)) for name in arenas["arena"]]
            capacity["arena", Tier.DEVICE] = sum(sizes)
            if Tier.HOST in tiers and pick(2):  # and those on the host
                capacity["arena", Tier.HOST] = sum(capacity.pop((name, Tier.HOST)) for name in arenas["arena"])
        self.cache = self.make(
            kinds,
            page_size=self.page,
            capacity=capacity,
            arenas=arenas,
            max_leases=1 + pick(6),
            max_length=MAX_LENGTH,
            policy=POLICIES[pick(len(POLICIES))],
            reuse=pick(12) > 0,
            write_policy=("write_through", "write_through_selective", "write_back")[pick(3)],
            write_hits=1 + pick(3),
            closed=[tier for tier in (Tier.HOST, Tier.STORAGE) if tier in tiers and not pick(4)],
            min_load={Tier.HOST: pick(8), Tier.STORAGE: pick(8)},
            fingerprint=b"model",
        )
        self.written = set(self.cache._inside().given.written)
        self.paged = [kind for kind in kinds if kind.rule != "recurrent"]
        self.states = [kind for kind in kinds if kind.rule == "recurrent"]
        self.content: dict[tuple[str, Tier], dict[int, int]] = {(k.name, t): {} for k in kinds for t in Tier}
        for name, tier in itertools.product(arenas.get("arena", ()), (Tier.DEVICE, Tier.HOST)):
            if ("arena", tier) in capacity:
                self.content[name, tier] = self.content[arenas["arena"][0], tier]

    # ---- content -----------------------------------------------------------------------------------------------

    @staticmethod
    def of(kind: str, namespace: str, tokens: list[int]) -> int:
        return hash((kind, namespace, tuple(tokens)))

    def compute(self, run: Running) -> None:
        """A step: everything grown is computed, after the moves are dispatched and what it reads is looked at."""
        self.dispatch()
        self.look(run)
        lease = run.lease
        for kind in self.states:
            read, write = self.cache.tables[kind.name][lease.row]
            if run.computed:
                have = self.content[kind.name, Tier.DEVICE].get(int(read))
                assert have == self.of(kind.name, lease.namespace, run.tokens[: run.computed]), "a wrong state is read"
            else:
                assert read == 0, "a fresh request must read the zero state"
            self.content[kind.name, Tier.DEVICE][int(write)] = self.of(
                kind.name, lease.namespace, run.tokens[: lease.length]
            )
        for kind in self.paged:
            row = self.cache.tables[kind.name][lease.row]
            for i in range(run.computed // self.page, -(-lease.length // self.page)):
                prefix = run.tokens[: min(lease.length, (i + 1) * self.page)]
                self.content[kind.name, Tier.DEVICE][int(row[i])] = self.of(kind.name, lease.namespace, prefix)
        run.computed = lease.length

    def look(self, run: Running) -> None:
        """Every page that the rule needs at the computed length is in the row and holds the right content."""
        if not run.lease.ready:
            return
        for kind in self.paged:
            row = self.cache.tables[kind.name][run.lease.row]
            for i in range(kind.start(run.computed) // self.page, -(-run.computed // self.page)):
                prefix = run.tokens[: min(run.computed, (i + 1) * self.page)]
                have = self.content[kind.name, Tier.DEVICE].get(int(row[i]))
                assert row[i] > 0, f"{kind.name}: page {i} is not in the row"
                assert have == self.of(kind.name, run.lease.namespace, prefix), (
                    f"{kind.name}: page {i} has another's content"
                )

    # ---- brute force -------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[str, Tier, str, tuple[int, ...], int]]:
        """Every page the tree can still be asked for: kind, tier, namespace, its token prefix and its slot."""
        tree = self.cache._inside().tree
        stack = [(name, (), child) for name, root in tree.roots.items() for child in root.children.values()]
        while stack:
            name, above, node = stack.pop()
            tokens = above + tuple(node.tokens.tolist())
            stack += [(name, tokens, child) for child in node.children.values()]
            for shelf in tree.shelves:
                entry = node.entries[shelf.index]
                for i, slot in enumerate(entry.pages.tolist() if entry else ()):
                    prefix = tokens[: (node.start + entry.lo + i + 1) * self.page]
                    yield shelf.kind.name, shelf.tier, name, prefix, slot

    def held(self) -> dict[tuple[str, Tier], set[tuple[str, tuple[int, ...]]]]:
        """By kind and tier, the token prefixes whose last page is present, read off the tree."""
        held = {(kind.name, tier): set() for kind in self.cache.kinds for tier in Tier}
        for kind, tier, name, prefix, _ in self.entries():
            held[kind, tier].add((name, prefix))
        return held

    def brute(self, key: Key, tier: Tier) -> int:
        """The longest boundary at which every kind holds its range on ``tier`` or nearer, by trying all of them."""
        held = self.held()
        tokens = tuple(key.tokens.tolist())
        for n in range(len(tokens) // self.page, 0, -1):
            boundary = n * self.page
            if (
                all(
                    any((key.namespace, tokens[: (i + 1) * self.page]) in held[kind.name, t] for t in Tier if t <= tier)
                    for kind in self.cache.kinds
                    for i in range(kind.start(boundary) // self.page, n)
                )
                and any(  # a boundary that needs nothing (a chunk's edge) still has to be known to the tree
                    p[1][:boundary] == tokens[:boundary] and p[0] == key.namespace for s in held.values() for p in s
                )
            ):
                return boundary
        return 0

    # ---- actions -----------------------------------------------------------------------------------------------

    def make_prompt(self) -> tuple[str, list[int]]:
        """Often a prefix of an earlier prompt with something new after it."""
        pick = self.pick
        if self.prompts and pick(4):
            name, old = self.prompts[pick(len(self.prompts))]
            tokens = old[: pick(len(old) + 1)]
        else:
            name, tokens = NAMESPACES[pick(8) == 0], []
        tokens = tokens + [pick(3) for _ in range(pick(MAX_LENGTH - len(tokens)))]
        prompt = (name, tokens or [pick(3)])
        self.prompts = [*self.prompts[-7:], prompt]
        return prompt

    def match(self) -> None:
        name, tokens = self.make_prompt()
        key = Key(tokens, name)
        before = self.cache.stats()
        hit = self.cache.match(key)
        assert self.cache.stats() == before
        why = self.cache.explain(key)
        assert str(why)
        assert why.branch == hit.branch
        for tier in Tier if self.search else ():
            assert hit.reach(tier) == self.brute(key, tier), f"{tier.name}: {hit} against {self.brute(key, tier)}"
        self.hits = [*self.hits[-3:], hit]

    def open(self) -> None:
        """Open a hit of now or of a while ago, sometimes only if there is room for more beside it."""
        if not self.hits or self.pick(3):
            self.match()
        hit = self.hits[self.pick(len(self.hits))]
        tier, priority = Tier(self.pick(4)), self.pick(3)
        if self.pick(2):
            lease = self.open_beside(hit, tier, priority)
        else:
            lease = self.cache.open(hit, tier, priority=priority)
        if lease is None:
            return
        run = Running(lease, hit.key.tokens.tolist(), lease.cached)
        self.running.append(run)
        self.look(run)

    def open_beside(self, hit: Hit, tier: Tier, priority: int) -> Lease | None:
        """Open where so much more could then be grown, and only there; a refusal leaves no trace."""
        room = {kind.name: self.pick(60) for kind in self.paged}
        inside = self.cache._inside()
        rows, version = len(inside.free_rows), inside.tree.version
        lease = self.cache.open(hit, tier, priority=priority, room=room)
        if lease is not None:
            assert self.lacks(room) == 0, f"{room} does not fit beside {lease}"
            return lease
        before = self.cache._frozen()
        assert self.cache.open(hit, tier, priority=priority, room=room) is None
        assert self.cache._frozen() == before, "a refused open changed something"
        if not rows or hit.version != version or inside.traffic.flights:
            return None  # for want of a row, or because the hit became shorter, or a copy keeps what its end will free
        lease = self.cache.open(hit, tier, priority=priority)
        if lease is not None and lease.cached == hit.reach(tier) and lease.ready:
            assert self.lacks(room) > 0, f"{room} fits beside {lease}"
        return lease

    def lacks(self, room: dict[str, int]) -> int:
        """Pages that the device lacks for so many tokens of each paged kind."""
        wanted: dict[str, int] = {}
        arenas = {}
        for shelf in self.cache._inside().paged:
            arenas[shelf.arena.name] = shelf.arena
            wanted[shelf.arena.name] = wanted.get(shelf.arena.name, 0) - (-room[shelf.kind.name] // self.page)
        return sum(max(0, pages - arenas[name].room) for name, pages in wanted.items())

    def one(self) -> Running | None:
        return self.running[self.pick(len(self.running))] if self.running else None

    def grow(self) -> None:
        run = self.one()
        if run is None or run.computed == MAX_LENGTH or not run.lease.ready:
            return
        if run.computed == len(run.tokens):
            run.tokens.append(self.pick(3))
        tokens = min(1 + self.pick(len(run.tokens) - run.computed), MAX_LENGTH - run.computed)
        room = self.cache.available_tokens()
        before = (self.cache.stats(), [t.copy() for t in self.cache.tables.by_kind])
        if self.cache.grow(run.lease, tokens):
            self.compute(run)
        else:
            assert room < tokens, f"refused to grow {tokens} with {room} available"
            assert before[0] == self.cache.stats(), "a refused grow changed something"

    def decode(self) -> None:
        batch = [run for run in self.running if run.lease.ready and run.computed < MAX_LENGTH]
        batch = batch[: 1 + self.pick(len(batch))] if batch else []
        for run in batch:
            if run.computed == len(run.tokens):
                run.tokens.append(self.pick(3))
        for run, ok in zip(batch, self.cache.grow_many([run.lease for run in batch]), strict=True):
            if ok:
                self.compute(run)

    def verify(self) -> None:
        """The newest token and a guess, of which some tokens are right; the others' slots go back."""
        run = self.one()
        if run is None or not run.lease.ready or run.computed == MAX_LENGTH or len(run.tokens) > run.computed + 1:
            return
        run.tokens[run.computed :] = [self.pick(3)]
        if not self.cache.grow(run.lease, 1):
            return
        guess = self.pick(min(6, MAX_LENGTH - run.computed))
        room, before = self.cache.available_tokens(), self.cache.stats()
        if not self.cache.grow(run.lease, guess, step=False):
            assert room < guess
            assert before == self.cache.stats(), "a refused grow changed something"
            guess = 0
        self.dispatch()
        self.look(run)
        for kind in self.paged:  # what is wrong is written too, until what is right is written over it
            row = self.cache.tables[kind.name][run.lease.row]
            for i in range(-(-run.computed // self.page), -(-run.lease.length // self.page)):
                assert row[i] > 0
                self.content[kind.name, Tier.DEVICE][int(row[i])] = None
        right = self.pick(guess + 1)
        assert self.cache.grow(run.lease, right - guess)
        run.tokens += [self.pick(3) for _ in range(right)]
        self.compute(run)

    def commit(self) -> None:
        run = self.one()
        if run is None or not run.lease.ready:
            return
        length = run.computed if self.pick(3) else run.computed - self.pick(run.computed + 1)
        key = run.key(length)
        self.cache.commit(run.lease, key, snapshot=self.pick(4) > 0)
        if key.tokens.flags.writeable:
            key.tokens[:] = -1
        self.look(run)

    def close(self) -> None:
        run = self.one()
        if run is None:
            return
        self.running.remove(run)
        self.cache.close(run.lease, keep=self.pick(4) > 0)

    def flush(self) -> None:
        if self.running or self.copying or self.offers or self.cache._inside().traffic.flights:
            try:
                self.cache.flush()
            except CacheBusy:
                return
            raise AssertionError("flush with live leases")
        self.cache.flush()
        for shelf in self.cache.stats().shelves.values():
            assert shelf.free == shelf.size

    def check(self) -> None:
        self.cache.check()

    # ---- tiers -------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Take the cache's moves; sources on the device are read now."""
        for move in self.cache.moves():
            assert (move.src, move.dst) in WAYS, f"{move.src.name} to {move.dst.name}"
            written = move.src < move.dst and move.id not in self.prefetched
            assert not written or move.dst in self.written, f"{move.dst.name} is closed"
            content = self.content[move.kind, move.src]
            read = [content.get(int(slot)) for slot in move.src_slots]
            self.copying.append(Copying(move, read))
            assert len(move.src_slots) == len(move.dst_slots)

    def finish(self) -> None:
        """A copy ends, well or badly."""
        self.dispatch()
        if not self.copying:
            return
        copying = self.copying.pop(self.pick(len(self.copying)))
        move = copying.move
        if self.pick(5) == 0:
            self.cache.learn(Failed(move.id))
            return
        source = self.content[move.kind, move.src]
        for i, (src, dst) in enumerate(zip(move.src_slots.tolist(), move.dst_slots.tolist(), strict=True)):
            content = copying.read[i] if move.src is Tier.DEVICE else source.get(src)
            self.content[move.kind, move.dst][dst] = content
            if move.digests:
                self.name(move.kind, move.digests[i], content)
            if move.dst is Tier.STORAGE:
                self.stored.add((move.kind, move.digests[i]))
        self.cache.learn(Done(move.id))
        for run in self.running:
            self.look(run)

    def name(self, kind: str, digest: bytes, content: int | None) -> None:
        assert self.named.setdefault((kind, digest), content) == content, "a digest of two pages"

    def ask(self) -> None:
        """A store is asked what it has of a prompt."""
        name, tokens = self.make_prompt()
        key = Key(tokens, name)
        before = {(k, t, slot): (space, prefix) for k, t, space, prefix, slot in self.entries() if t is Tier.STORAGE}
        question = self.cache.ask(key)
        if question is None:
            return
        assert question.reach == self.cache.match(key).reach(Tier.STORAGE) < len(key) // self.page * self.page
        held = [page in self.stored or self.pick(4) > 0 for page in question.pages]
        for found in question.answer(held, 1 + self.pick(8)):
            self.cache.learn(found)
        for k, t, space, prefix, slot in self.entries():
            if t is Tier.STORAGE and before.get((k, t, slot)) != (space, prefix):
                self.content[k, t][slot] = self.of(k, space, list(prefix))

    def found(self) -> None:
        """A store or a peer says that it holds a prompt's prefix."""
        if not self.prompts:
            return
        name, tokens = self.prompts[self.pick(len(self.prompts))]
        key = Key(tokens[: self.pick(len(tokens) + 1)], name)
        tier = (Tier.STORAGE, Tier.PEER)[self.pick(2)]
        kind = self.cache.kinds[self.pick(len(self.cache.kinds))].name if self.pick(4) == 0 else ""
        before = {(k, t, slot): (space, prefix) for k, t, space, prefix, slot in self.entries() if t is tier}
        self.cache.learn(Found(key, tier, kind))
        for k, t, space, prefix, slot in self.entries():
            if t is tier and before.get((k, t, slot)) != (space, prefix):
                self.content[k, t][slot] = self.of(k, space, list(prefix))

    def lost(self) -> None:
        if not self.prompts:
            return
        name, tokens = self.prompts[self.pick(len(self.prompts))]
        start = self.pick(len(tokens) + 1)
        key = Key(tokens[: start + self.pick(len(tokens) - start + 1)], name)
        self.cache.learn(Lost(key, (Tier.HOST, Tier.STORAGE, Tier.PEER)[self.pick(3)], start=start))

    ACTIONS = (match, open, open, open, grow, grow, grow, grow, decode, decode, verify, commit, commit, commit, close,
               close, finish, finish, finish, finish, found, ask, lost, control)  # fmt: skip

    def state(self) -> str:
        """All that the cache holds, in an order that does not depend on the process."""
        entries = sorted((*map(str, entry[:3]), entry[3], entry[4]) for entry in self.entries())
        tables = [table.tolist() for table in self.cache.tables.by_kind]
        return repr((entries, tables, self.cache.stats(), [str(run.lease) for run in self.running]))

    def step(self) -> None:
        """One action, chosen by ``pick``, and a check."""
        if self.pick(400) == 0:
            self.flush()
        else:
            self.ACTIONS[self.pick(len(self.ACTIONS))](self)
        self.check()
