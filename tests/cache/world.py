"""A small world around a cache: requests, page contents and a brute-force answer for everything the cache says.

One class, two drivers: hypothesis (``test_fuzz.py``) and a seeded loop (``fuzz.py``) call the same actions.
Every page's content is simulated as the hash of the token prefix that was computed into it, so a page shared with,
or left to, the wrong request is noticed as soon as it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rootcellar.cache import Hit, Key, Kind, Lease, RadixCache, Tier, chunked_local, full, recurrent, sliding_window
from rootcellar.cache.check import walk
from rootcellar.errors import CacheBusy

Pick = Callable[[int], int]  # n -> an int in [0, n)

POLICIES = ("lru", "lfu", "fifo", "filo", "mru", "slru", "priority")
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


@dataclass
class Running:
    """A request of the world: its lease, its tokens and how many of them are computed."""

    lease: Lease
    tokens: list[int]
    computed: int
    committed: int = 0


@dataclass
class World:
    pick: Pick
    cache: RadixCache = field(init=False)
    running: list[Running] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    prompts: list[tuple[str, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        pick = self.pick
        kinds = KIND_MIXES[pick(len(KIND_MIXES))]
        self.page = (1, 2, 4)[pick(3)]
        capacity = {}
        for kind in kinds:
            size = 3 + pick(8) if kind.rule == "recurrent" else 8 + pick(90)
            capacity[kind.name, Tier.DEVICE] = size
        self.cache = RadixCache(
            kinds,
            page_size=self.page,
            capacity=capacity,
            max_leases=1 + pick(6),
            max_length=MAX_LENGTH,
            policy=POLICIES[pick(len(POLICIES))],
            reuse=pick(12) > 0,
        )
        self.paged = [kind for kind in kinds if kind.rule != "recurrent"]
        self.states = [kind for kind in kinds if kind.rule == "recurrent"]
        self.content: dict[tuple[str, Tier], dict[int, int]] = {(k.name, t): {} for k in kinds for t in Tier}

    # ---- content -----------------------------------------------------------------------------------------------

    @staticmethod
    def of(namespace: str, tokens: list[int]) -> int:
        return hash((namespace, tuple(tokens)))

    def compute(self, run: Running) -> None:
        """A step: everything grown is computed, after looking at what it reads."""
        self.look(run)
        lease = run.lease
        for kind in self.states:
            read, write = self.cache.tables[kind.name][lease.row]
            if run.computed:
                have = self.content[kind.name, Tier.DEVICE].get(int(read))
                assert have == self.of(lease.namespace, run.tokens[: run.computed]), "a wrong state is read"
            else:
                assert read == 0, "a fresh request must read the zero state"
            self.content[kind.name, Tier.DEVICE][int(write)] = self.of(lease.namespace, run.tokens[: lease.length])
        for kind in self.paged:
            row = self.cache.tables[kind.name][lease.row]
            for i in range(run.computed // self.page, -(-lease.length // self.page)):
                prefix = run.tokens[: min(lease.length, (i + 1) * self.page)]
                self.content[kind.name, Tier.DEVICE][int(row[i])] = self.of(lease.namespace, prefix)
        run.computed = lease.length

    def look(self, run: Running) -> None:
        """Every page that the rule needs at the computed length is in the row and holds the right content."""
        for kind in self.paged:
            row = self.cache.tables[kind.name][run.lease.row]
            for i in range(kind.start(run.computed) // self.page, -(-run.computed // self.page)):
                prefix = run.tokens[: min(run.computed, (i + 1) * self.page)]
                have = self.content[kind.name, Tier.DEVICE].get(int(row[i]))
                assert row[i] > 0, f"{kind.name}: page {i} is not in the row"
                assert have == self.of(run.lease.namespace, prefix), f"{kind.name}: page {i} has another's content"

    # ---- brute force -------------------------------------------------------------------------------------------

    def held(self) -> dict[tuple[str, Tier], set[tuple[str, tuple[int, ...]]]]:
        """By kind and tier, the token prefixes whose last page is present, read off the tree."""
        cache = self.cache
        held = {(kind.name, tier): set() for kind in cache.kinds for tier in Tier}
        paths = {id(root): (name, ()) for name, root in cache._tree.roots.items()}
        for node in walk(cache._tree):
            name, above = paths[id(node.parent)]
            tokens = above + tuple(node.tokens.tolist())
            paths[id(node)] = (name, tokens)
            for shelf in cache._tree.shelves:
                entry = node.entries[shelf.index]
                if entry is not None:
                    for i in range(entry.lo, entry.lo + len(entry.pages)):
                        prefix = tokens[: (node.start + i + 1) * self.page]
                        held[shelf.kind.name, shelf.tier].add((name, prefix))
        return held

    def brute(self, key: Key, tier: Tier) -> int:
        """The longest boundary at which every kind holds its range on ``tier`` or nearer, by trying all of them."""
        held = self.held()
        tokens = tuple(key.tokens.tolist())
        for n in range(len(tokens) // self.page, 0, -1):
            boundary = n * self.page
            if all(
                any((key.namespace, tokens[: (i + 1) * self.page]) in held[kind.name, t] for t in Tier if t <= tier)
                for kind in self.cache.kinds
                for i in range(kind.start(boundary) // self.page, n)
            ):
                # A boundary that needs nothing (a chunk's edge) still has to be known to the tree.
                if any(
                    p[1][:boundary] == tokens[:boundary] and p[0] == key.namespace for s in held.values() for p in s
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
        for tier in Tier:
            assert hit.reach(tier) == self.brute(key, tier), f"{tier.name}: {hit} against {self.brute(key, tier)}"
        self.hits = [*self.hits[-3:], hit]

    def open(self) -> None:
        """Open a hit of now or of a while ago."""
        if not self.hits or self.pick(3):
            self.match()
        hit = self.hits[self.pick(len(self.hits))]
        lease = self.cache.open(hit, priority=self.pick(3))
        if lease is None:
            return
        run = Running(lease, hit.key.tokens.tolist(), lease.cached)
        self.running.append(run)
        self.look(run)

    def one(self) -> Running | None:
        return self.running[self.pick(len(self.running))] if self.running else None

    def grow(self) -> None:
        run = self.one()
        if run is None:
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

    def commit(self) -> None:
        run = self.one()
        if run is None:
            return
        length = run.computed if self.pick(3) else run.computed - self.pick(run.computed + 1)
        key = Key(run.tokens[:length], run.lease.namespace)
        self.cache.commit(run.lease, key, snapshot=self.pick(4) > 0)
        self.look(run)

    def close(self) -> None:
        run = self.one()
        if run is None:
            return
        self.running.remove(run)
        self.cache.close(run.lease, keep=self.pick(4) > 0)

    def flush(self) -> None:
        if self.running:
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

    ACTIONS = (match, open, open, open, grow, grow, grow, grow, decode, decode, commit, commit, commit, close, close)

    def step(self) -> None:
        """One action, chosen by ``pick``, and a check."""
        if self.pick(400) == 0:
            self.flush()
        else:
            self.ACTIONS[self.pick(len(self.ACTIONS))](self)
        self.check()
