"""The mover: bytes arrive, in order with steps; what breaks or takes too long is reported, and nobody waits for it."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootcellar.cache import Answer, Done, Failed, Move, Reports, Tier
from rootcellar.plan.stored import Latents
from rootcellar.pools import Pool
from rootcellar.pools.copying import Blocks, copier
from rootcellar.pools.images import Image
from rootcellar.pools.layouts import layout_of
from rootcellar.tiers.faulty import Faults, Faulty
from rootcellar.tiers.host import HostMemory
from rootcellar.tiers.mover import Mover

PAGES = 12


class Gate:
    """A copier whose copies end when they are let, and fail when they are told to."""

    in_place = False

    def __init__(self, inner):
        self.inner, self.image = inner, inner.image
        self.open, self.broken = threading.Event(), False

    def read(self, pages, images, rows):
        wait = self.inner.read(pages, images, rows)

        def gated():
            assert self.open.wait(60)
            if self.broken:
                raise OSError("broken")
            wait()

        return gated

    def fetch(self, images, rows):
        assert self.open.wait(60)
        if self.broken:
            raise OSError("broken")
        return self.inner.fetch(images, rows)

    def write(self, pages, fetched):
        return self.inner.write(pages, fetched)


class Setting:
    """A pool of one layer, host memory, and a mover between them."""

    def __init__(self, wrap=lambda inner: inner, how=copier, rows=PAGES, **options):
        self.pool = Pool(layout_of(Latents(6, 2), "float32", 4), 1, PAGES)
        self.pool.buffers = [(jnp.arange((PAGES + 1) * 32, dtype=jnp.float32).reshape(PAGES + 1, 4, 8),)]
        self.copier = wrap(how(self.pool))
        self.host = HostMemory({"full": rows}, {"full": self.copier.image.nbytes})
        self.mover = Mover({"full": self.copier}, self.host.images, {"full": "full"}, **options)
        self.woken = threading.Semaphore(0)
        self.mover.listen(self.woken.release)
        self._ids = 0

    def move(self, src, dst, pages, onto):
        self._ids += 1
        return Move(self._ids, "full", src, dst, np.array(pages, np.int32), np.array(onto, np.int32), 0, ())

    def down(self, pages, onto):
        return self.move(Tier.DEVICE, Tier.HOST, pages, onto)

    def up(self, pages, onto):
        return self.move(Tier.HOST, Tier.DEVICE, pages, onto)

    def page(self, page):
        return np.asarray(self.pool.buffers[0][0][page]).ravel().tolist()

    def row(self, page):
        return self.host.images["full"][page - 1].view(np.float32).tolist()


@pytest.fixture
def made():
    """Makes settings, and ends their threads."""
    all_made = []

    def make(*args, **options):
        all_made.append(Setting(*args, **options))
        return all_made[-1]

    yield make
    for setting in all_made:
        setting.mover.close()


def blocks(pool):
    return Blocks(pool, Image(pool))


HOWS = pytest.mark.parametrize("how", [copier, blocks], ids=["fastest", "blocks"])


@HOWS
def test_pages_go_down_and_come_up_elsewhere(made, how):
    s = made(how=how)
    before = {page: s.page(page) for page in range(1, PAGES + 1)}
    down = [s.down([3, 7], [1, 2]), s.down([5], [9])]
    s.mover.dispatch(down)
    assert s.mover.drain() == Reports(tuple(Done(m.id) for m in down))
    assert [s.row(1), s.row(2), s.row(9)] == [before[3], before[7], before[5]]
    up = s.up([2, 9], [11, 4])
    s.mover.dispatch([up])
    assert s.mover.drain() == Reports((Done(up.id),))
    assert (s.page(11), s.page(4)) == (before[7], before[5])
    assert s.page(3) == before[3]
    stats = s.mover.stats()
    assert (stats["device-host"]["pages"], stats["device-host"]["moves"], stats["host-device"]["pages"]) == (3, 2, 2)
    assert stats["device-host"]["bytes"] == 3 * s.copier.image.nbytes
    assert all(lane["queued_bytes"] == lane["failed_pages"] == lane["skipped_pages"] == 0 for lane in stats.values())


@HOWS
def test_what_is_read_is_what_was_there_before_the_next_step(made, how):
    s = made(Gate, how=how)
    before = s.page(3)
    s.mover.dispatch([s.down([3], [1])])
    step = jax.jit(lambda buffers: jax.tree.map(jnp.zeros_like, buffers), donate_argnums=0)
    s.pool.buffers = step(s.pool.buffers)
    s.copier.open.set()
    s.mover.drain()
    assert s.row(1) == before


@HOWS
def test_a_page_that_one_move_leaves_another_may_write_in_the_same_call(made, how):
    s = made(how=how)
    first = s.page(2)
    s.mover.dispatch([s.down([2], [5])])
    s.mover.drain()
    third = s.page(3)
    s.mover.dispatch([s.up([5], [3]), s.down([3], [6])])
    assert len(s.mover.drain().events) == 2
    assert (s.page(3), s.row(6)) == (first, third)


def test_news_wakes_once_and_nothing_is_reported_before_it_is_done(made):
    s = made(Gate)
    s.mover.dispatch([s.down([1], [1]), s.down([2], [2])])
    assert not s.mover.reports()
    assert not s.woken.acquire(blocking=False)
    s.copier.open.set()
    assert s.woken.acquire(timeout=60)
    assert s.mover.reports() == Reports((Done(1), Done(2)))
    assert not s.woken.acquire(blocking=False)
    s.mover.dispatch([s.up([1], [9])])
    assert s.woken.acquire(timeout=60), "fetched: the thread of the steps has to write it"
    assert s.mover.reports().events + s.mover.drain().events == (Done(3),)


def test_what_would_make_the_queue_too_long_is_skipped_and_counted(made):
    s = made(Gate, most_queued=3 * 128)
    s.mover.dispatch([s.down([1, 2], [1, 2])])
    s.mover.dispatch([s.down([3, 4], [3, 4])])
    s.mover.dispatch([s.down([5], [5])])
    assert s.woken.acquire(timeout=60), "who is asleep has to learn of it"
    assert s.mover.reports() == Reports((Failed(2),))
    assert s.mover.stats()["device-host"]["skipped_pages"] == 2
    assert s.mover.stats()["device-host"]["queued_bytes"] == 3 * 128
    s.copier.open.set()
    assert s.mover.drain() == Reports((Done(1), Done(3)))
    s.mover.dispatch([s.down([3, 4, 5, 6], [3, 4, 5, 6])])  # too much, but nothing else waits
    assert s.mover.drain() == Reports((Done(4),))


def test_the_patient_wait_for_room_instead(made):
    s = made(Gate, most_queued=128)
    s.mover.dispatch([s.down([1], [1])])
    threading.Timer(0.01, s.copier.open.set).start()
    s.mover.dispatch([s.down([2], [2])], patient=True)
    assert s.mover.drain() == Reports((Done(1), Done(2)))


def test_a_copy_that_breaks_is_failed_and_the_next_succeeds(made):
    s = made(Gate)
    s.copier.broken = True
    s.copier.open.set()
    s.mover.dispatch([s.down([1, 2], [1, 2]), s.up([4], [4])])
    assert set(s.mover.drain().events) == {Failed(1), Failed(2)}
    stats = s.mover.stats()
    assert (stats["device-host"]["failed_pages"], stats["host-device"]["failed_pages"]) == (2, 1)
    assert stats["device-host"]["queued_bytes"] == stats["host-device"]["queued_bytes"] == 0
    s.copier.broken = False
    s.mover.dispatch([s.down([1], [1])])
    assert s.mover.drain() == Reports((Done(3),))


def test_what_cannot_begin_is_failed_too(made):
    s = made()
    s.pool.free()
    s.mover.dispatch([s.down([1], [1]), s.up([1], [1])])
    assert set(s.mover.drain().events) == {Failed(1), Failed(2)}
    assert not s.mover.drain()
    s.pool.allocate()


@HOWS
@pytest.mark.parametrize("seed", range(3))
def test_whatever_breaks_every_move_is_reported_and_none_that_is_done_has_other_bytes(made, how, seed):
    faults = Faults(delay=0.1, fail=0.15, short=0.15, flip=0.2, late=0.001)
    s = made(lambda inner: Faulty(inner, faults, seed), how=how)
    rng, held = np.random.default_rng(seed), {}
    pages = {page: s.page(page) for page in range(1, PAGES + 1)}
    for _ in range(60):
        n = int(rng.integers(1, 4))
        some, onto = (rng.permutation(np.arange(1, PAGES + 1))[:n].tolist() for _ in range(2))
        s.mover.dispatch([move := s.down(some, onto)])
        (event,) = s.mover.drain().events
        held |= dict.fromkeys(onto)
        if event == Done(move.id):
            held |= {row: pages[page] for row, page in zip(onto, some, strict=True)}
        whole = [row for row, content in held.items() if content is not None][:3]
        if not whole:
            continue
        onto = rng.permutation(np.arange(1, PAGES + 1))[: len(whole)].tolist()
        s.mover.dispatch([move := s.up(whole, onto)])
        (event,) = s.mover.drain().events
        if event == Done(move.id):
            pages |= {page: held[row] for page, row in zip(onto, whole, strict=True)}
        assert {page: s.page(page) for page in pages} == pages
    assert min(s.copier.seen.values()) > 0, s.copier.seen


def test_what_comes_while_reports_are_made_wakes_who_made_them(made):
    """Of two loads the second is fetched while the first is written, and there were reports already."""

    class Meanwhile(Gate):
        def write(self, pages, fetched):
            self.open.set()
            with s.mover._news.changed:
                assert s.mover._news.changed.wait_for(lambda: s.mover._news._fetched, timeout=60)
            self.write = self.inner.write
            return self.inner.write(pages, fetched)

    s = made(Meanwhile)
    down, first, second = s.down([3], [1]), s.up([1], [5]), s.up([1], [6])
    s.copier.open.set()
    s.mover.dispatch([down])
    s.mover.dispatch([first])
    with s.mover._news.changed:
        assert s.mover._news.changed.wait_for(lambda: s.mover._news._fetched and s.mover._news._events, timeout=60)
    s.copier.open.clear()
    s.mover.dispatch([second])
    while s.woken.acquire(blocking=False):
        pass
    assert s.mover.reports() == Reports((Done(down.id),))
    assert s.woken.acquire(blocking=False)
    assert sorted(event.move for event in s.mover.drain().events) == [first.id, second.id]


def test_without_a_store_what_goes_there_fails_at_once_and_questions_are_answered_with_nothing(made):
    s = made()
    s.mover.dispatch([s.move(Tier.HOST, Tier.STORAGE, [1], [1]), s.move(Tier.STORAGE, Tier.HOST, [1], [1])])
    assert s.woken.acquire(timeout=60)
    s.mover.ask(7, None)
    assert s.mover.reports() == Reports((Failed(1), Failed(2)), (Answer(7, ()),))
    s.mover.ask(8, None)
    assert s.woken.acquire(timeout=60)
    assert s.mover.drain() == Reports((), (Answer(8, ()),))
