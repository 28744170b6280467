"""A cache of either core, bytes on each of its tiers, and a mover between them: what is read must be what was written.

Every page holds bytes that follow from its kind and its digest, so another's are noticed as soon as a request reads it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from importlib.util import find_spec

import numpy as np

from rootcellar.cache import Done, Failed, Key, Tier, digests, full, recurrent, sliding_window
from rootcellar.cache.radix import PyRadixCache
from rootcellar.tiers.host import HostMemory
from rootcellar.tiers.mover import Mover

CORES: dict[str, type] = {"python": PyRadixCache}
if find_spec("rootcellar.cache._core") is not None:
    from rootcellar.cache.native import NativeRadixCache

    CORES["native"] = NativeRadixCache

PAGE = 4
NBYTES = {"arena": 96, "state": 160}
POOL_OF = {"full": "arena", "window": "arena", "state": "state"}
FINGERPRINT = b"model"


class ArrayCopier:
    """Copies pages of an array ``[pages + 1, bytes]``: read at once, as by the device's order of programs."""

    in_place = False

    def __init__(self, array):
        self.array = array

    def read(self, pages, images, rows):
        taken = self.array[pages].copy()

        def wait():
            images[rows] = taken

        return wait

    def fetch(self, images, rows):
        return images[rows].copy()

    def write(self, pages, fetched):
        self.array[pages] = fetched
        return lambda: None


class Traffic:
    """Requests over a cache whose pages of full and windowed layers share an arena; states are apart.

    ``device``, ``host`` and ``storage``: tokens of each paged kind.
    """

    def __init__(self, core, store=None, *, device=96, host=400, storage=1000, **options):
        kinds = (full("full"), sliding_window("window", window=6), recurrent("state"))
        capacity = {("arena", Tier.DEVICE): 2 * device, ("arena", Tier.HOST): 2 * host}
        capacity |= {
            ("state", Tier.DEVICE): 10,
            ("state", Tier.HOST): host // 16,
            ("state", Tier.STORAGE): storage // 4,
        }
        capacity |= {(name, Tier.STORAGE): storage for name in ("full", "window")}
        self.cache = CORES[core](
            kinds,
            page_size=PAGE,
            capacity=capacity,
            arenas={"arena": ("full", "window")},
            max_leases=4,
            max_length=256,
            fingerprint=FINGERPRINT,
            **options,
        )
        pages = {"arena": 2 * device // PAGE, "state": 10}
        rows = {"arena": 2 * host // PAGE, "state": host // 16}
        self.device = {pool: np.full((n + 1, NBYTES[pool]), 0xAA, np.uint8) for pool, n in pages.items()}
        self.host = HostMemory(rows, NBYTES).images
        self.mover = Mover({pool: ArrayCopier(array) for pool, array in self.device.items()}, self.host, POOL_OF)
        if store is not None:
            self.mover.attach(store)
        self.dispatched: Counter[int] = Counter()
        self.reported: Counter[int] = Counter()
        self.failed: set[int] = set()
        self.asked: Counter[int] = Counter()
        self.answered: Counter[int] = Counter()

    # -- moving -----------------------------------------------------------------------------------------------------

    def dispatch(self):
        moves = self.cache.moves()
        self.dispatched.update(move.id for move in moves)
        self.mover.dispatch(moves)
        return moves

    def take(self, reports):
        """What is reported is learned; nothing twice, nothing that was not asked for."""
        for event in reports.events:
            assert isinstance(event, Done | Failed)
            self.cache.learn(event)
            self.failed |= {event.move} if isinstance(event, Failed) else set()
        for answer in reports.answers:
            for found in answer.events:
                self.cache.learn(found)
        self.reported.update(event.move for event in reports.events)
        self.answered.update(answer.serial for answer in reports.answers)
        assert self.reported <= self.dispatched
        assert self.answered <= self.asked

    def settle(self):
        """All copies and questions come to their ends, and those that follow from them."""
        while True:
            moves = self.dispatch()
            self.take(reports := self.mover.drain())
            if not (moves or reports):
                break
        assert self.reported == self.dispatched
        assert self.answered == self.asked
        self.cache.check()

    def check_idle(self):
        """Nothing is under way, and nothing is held for what was."""
        self.settle()
        for lane, counts in self.mover.stats().items():
            assert lane in ("store", "breaker") or counts["queued_bytes"] == 0
        for shelf in self.cache.stats().shelves.values():
            assert shelf.in_flight == shelf.pinned == shelf.leased == 0
        for tier in (Tier.HOST, Tier.STORAGE):
            self.cache.forget_tier(tier)
        self.cache.flush()
        self.cache.check()

    def forget(self, *tiers):
        """Forget these tiers, and spoil what lies there."""
        for tier in tiers:
            self.cache.forget_tier(tier)
            for array in ({Tier.DEVICE: self.device, Tier.HOST: self.host}.get(tier) or {}).values():
                array[:] = 0xAA

    # -- requests ---------------------------------------------------------------------------------------------------

    def ask(self, ids):
        """Ask the store about a prompt; whether there was anything to ask."""
        if (question := self.cache.ask(Key(ids))) is None:
            return False
        serial = len(self.asked)
        self.asked[serial] += 1
        self.mover.ask(serial, question)
        return True

    def open(self, ids, tier=Tier.STORAGE):
        """Open a prompt with what tiers up to ``tier`` hold of it."""
        return self.cache.open(self.cache.match(Key(ids)), tier)

    def serve(self, ids, tier=Tier.DEVICE):
        """A whole request, which looks at what it reads; tokens that it did not compute. None: no room."""
        while True:
            if (lease := self.open(ids, tier)) is None:
                return None
            self.wait(lease)
            if not lease.lost:
                break
            self.cache.close(lease)  # matches again
        given = lease.cached
        self.compute(lease, ids)
        self.cache.close(lease)
        return given

    def wait(self, lease):
        """Until its bytes are there, or lost."""
        while not (lease.ready or lease.lost):
            self.dispatch()
            reports = self.mover.drain()
            assert reports, "it waits for nothing"
            self.take(reports)

    def compute(self, lease, ids):
        """Compute what is missing, a page or two at a time, after a look at what was there."""
        key = Key(ids)
        named = digests(key, PAGE, FINGERPRINT)
        self.look(lease, named)
        while lease.length < len(ids):
            start = lease.length
            left = len(ids) - start
            step = min(2 * PAGE, left // PAGE * PAGE or left)
            if not self.cache.grow(lease, step):
                shelves = self.cache.stats().shelves
                loads = [shelf.in_flight for (_, tier), shelf in shelves.items() if tier is Tier.DEVICE]
                assert any(loads), "only what is on its way to the device may be in the way"
                self.settle()
                assert self.cache.grow(lease, step), shelves
            self.dispatch()  # sources on the device are read before they are overwritten
            self.write(lease, named, start, start + step)
            if (start + step) % PAGE == 0:
                self.cache.commit(lease, key[: start + step])
        self.dispatch()

    def look(self, lease, named):
        """All that resuming needs is there, and right."""
        n = lease.cached
        for kind in self.cache.kinds if n else ():
            row, array = self.cache.tables[kind.name][lease.row], self.device[POOL_OF[kind.name]]
            if kind.rule == "recurrent":
                assert array[row[0]].tobytes() == content(kind.name, named[n // PAGE - 1])
                continue
            for page in range(kind.start(n) // PAGE, n // PAGE):
                assert row[page] > 0
                assert array[row[page]].tobytes() == content(kind.name, named[page]), f"page {page} of {kind.name}"

    def write(self, lease, named, start, stop):
        """What a step computes."""
        for kind in self.cache.kinds:
            row, array = self.cache.tables[kind.name][lease.row], self.device[POOL_OF[kind.name]]
            if kind.rule == "recurrent":
                whole = stop % PAGE == 0
                array[row[1]] = np.frombuffer(content(kind.name, named[stop // PAGE - 1]), np.uint8) if whole else 0xAA
                continue
            for page in range(start // PAGE, stop // PAGE):
                array[row[page]] = np.frombuffer(content(kind.name, named[page]), np.uint8)


def content(kind, digest):
    """The bytes of a page."""
    return hashlib.shake_128(kind.encode() + digest).digest(NBYTES[POOL_OF[kind]])


def prompt(which, length):
    """Prompts of one number begin alike."""
    return np.arange(1000 * which, 1000 * which + length)
