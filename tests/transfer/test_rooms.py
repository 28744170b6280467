"""Rooms over the real wire: who meets whom, what is sent, and what becomes of it when either goes away."""

import json
import socket
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rootcellar.cache import Done, Failed, Manifest, Move, Part, Tier
from rootcellar.errors import RequestError
from rootcellar.scheduler import Room
from rootcellar.tiers.news import News
from rootcellar.transfer.faulty import FaultyWires, WireFaults
from rootcellar.transfer.receiver import Parted, Receiver, Welcomed
from rootcellar.transfer.sender import Arrived, Joined, Left, Satisfied, Sender, SentAway
from rootcellar.transfer.talk import Patience, Say, pages_said
from rootcellar.transfer.terms import Terms
from rootcellar.transfer.wires.tcp import Framed
from serving import wait_until

SIZES = {"full": 4096, "state": 100}
TERMS = Terms(16, "float32", "float32", (("full", "full", 0), ("state", "recurrent", 0)), SIZES, "Some", "abcd")
WEIGHTS, LAST = "files-1", "ab" * 32
PAGES = 90


def name(i):
    return i.to_bytes(32, "little")


class Copies:
    """Copies from a device whose pages are rows of an array."""

    def __init__(self, nbytes, seed):
        self.image = SimpleNamespace(nbytes=nbytes)
        self.pages = np.random.default_rng(seed).integers(256, size=(PAGES + 1, nbytes), dtype=np.uint8)
        self.fails = False

    def read(self, pages, images, rows):
        def wait():
            if self.fails:
                raise RuntimeError("the device is on fire")
            images[rows] = self.pages[pages]

        return wait


class Nodes:
    """A prefill node and a decode node, and what each was told."""

    def __init__(self, patience, theirs=TERMS, giving=None, taking=None):
        self.copies = {kind: Copies(nbytes, i) for i, (kind, nbytes) in enumerate(SIZES.items())}
        self.host = {kind: np.zeros((PAGES, nbytes), np.uint8) for kind, nbytes in SIZES.items()}
        self.news, self.woken = News(), threading.Event()
        plain = {} if giving is None else {"wrap": giving}
        self.sender = Sender(TERMS, self.copies, "127.0.0.1", 0, patience, **plain)
        mover = SimpleNamespace(take_from=lambda _: self.news)
        plain = {} if taking is None else {"wrap": taking}
        self.receiver = Receiver(theirs, self.host, mover, patience, **plain)
        for each in (self.sender, self.receiver, self.news):
            each.listen(self.woken.set)
        self.gave, self.took, self.told = [], [], []
        self.serial = 0

    def close(self):
        self.receiver.close()
        self.sender.close()

    def until(self, condition):
        """What an engine's threads do, until it holds."""
        for _ in range(1000):
            self.woken.clear()
            self.gave += self.sender.take()
            self.sender.pump()
            self.took += self.receiver.take()
            self.told += self.news.take()[0].events
            if condition():
                return
            assert self.woken.wait(10), (self.gave, self.took, self.told)
        raise AssertionError("waited in vain")

    def join(self, number, start=0, **other):
        room = Room("127.0.0.1", other.pop("port", self.sender.port), number)
        return self.receiver.join(room, other.get("weights", WEIGHTS), other.get("last", LAST), start)

    def meet(self, number):
        """Both are in a room; the visit."""
        self.sender.expect(number, WEIGHTS, LAST)
        visit = self.join(number)
        self.until(lambda: Welcomed(visit) in self.took)
        return visit

    def offer(self, number, ident, first, stop, kind="full"):
        part = Part(kind, first, np.arange(first + 1, stop + 1), tuple(map(name, range(first, stop))))
        self.sender.offer(number, Manifest(ident, stop, (part,)))

    def read(self, visit, ident, first, stop, kind="full"):
        """Have pages brought to the rows of the same number."""
        digests = tuple(map(name, range(first, stop)))
        self.receiver.promised(visit, [(kind, digest) for digest in digests])
        slots = np.arange(first + 1, stop + 1, dtype=np.int32)
        self.receiver.read([Move(ident, kind, Tier.PEER, Tier.HOST, slots, slots, first, digests)])


@pytest.fixture
def make():
    made = []

    def nodes(patience=Patience(silence=20), **options):  # noqa: B008
        made.append(Nodes(patience, **options))
        return made[-1]

    yield nodes
    for each in made:
        each.close()


def same(nodes, first, stop, kind="full"):
    return np.array_equal(nodes.host[kind][first:stop], nodes.copies[kind].pages[first + 1 : stop + 1])


def hello(nodes, room):
    """What a decode node begins with."""
    node = nodes.sender.node
    said = {"room": room, "start": 0, "node": node, "weights": WEIGHTS, "last": LAST, "terms": TERMS.plain()}
    return json.dumps(said).encode()


def test_pages_come_as_they_are_offered_and_are_let_go_of_when_they_have_come(make):
    nodes = make()
    nodes.sender.expect(5, WEIGHTS, LAST)
    visit = nodes.join(5, start=32)
    nodes.until(lambda: Welcomed(visit) in nodes.took and Joined(5, 32) in nodes.gave)
    nodes.offer(5, 1, 0, 40)
    nodes.read(visit, 11, 2, 20)
    nodes.read(visit, 12, 20, 80)
    nodes.read(visit, 13, 79, 80, "state")
    nodes.until(lambda: Done(11) in nodes.told)
    assert same(nodes, 2, 20)
    assert Done(12) not in nodes.told, "half of it is yet to be computed"
    nodes.until(lambda: Arrived(5, (1,)) in nodes.gave)
    nodes.offer(5, 2, 40, 80)
    nodes.offer(5, 3, 79, 80, "state")
    nodes.sender.computed(5)
    nodes.until(lambda: len(nodes.told) == 3)
    assert nodes.told[0] == Done(11)
    assert same(nodes, 20, 80)
    assert same(nodes, 79, 80, "state")
    assert not nodes.host["full"][:2].any(), "nobody asked for them"
    nodes.receiver.leave(visit, satisfied=True)
    nodes.until(lambda: Satisfied(5) in nodes.gave)
    assert nodes.sender.end(5) == []
    assert nodes.sender.stats.pages == nodes.receiver.stats.pages == 79
    assert nodes.sender.stats.bytes == nodes.receiver.stats.bytes == 78 * 4096 + 100
    assert not [event for event in nodes.gave if isinstance(event, Left)]


def test_whoever_is_first_waits_for_the_other(make):
    nodes = make()
    visit = nodes.join(1)
    nodes.until(lambda: nodes.sender.stats.rooms == 0)
    nodes.sender.expect(1, WEIGHTS, LAST)
    nodes.until(lambda: Welcomed(visit) in nodes.took)
    with pytest.raises(RequestError, match="bootstrap_room 1 is in use"):
        nodes.sender.expect(1, WEIGHTS, LAST)
    other = nodes.join(1)
    nodes.until(lambda: any(isinstance(event, Parted) for event in nodes.took))
    (parted,) = [event for event in nodes.took if isinstance(event, Parted)]
    assert parted.visit == other
    assert "another decode node is in it" in parted.why
    nodes.offer(1, 1, 0, 4)
    nodes.read(visit, 1, 0, 4)
    nodes.until(lambda: Done(1) in nodes.told)


def test_a_decode_node_that_has_all_says_so_and_the_prefill_node_is_done(make):
    nodes = make()
    nodes.receiver.leave(nodes.join(3, 96), satisfied=True)
    nodes.sender.expect(3, WEIGHTS, LAST)
    nodes.until(lambda: Satisfied(3) in nodes.gave)
    assert nodes.took == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"weights": "files-2"}, "'files-1' on the prefill node and 'files-2' on the decode node"),
        ({"last": "cd" * 32}, "abababababababab on the prefill node and cdcdcdcdcdcdcdcd on the decode node"),
        ({"last": ""}, "None on the decode node"),
    ],
)
@pytest.mark.parametrize("first", ["room", "node"])
def test_who_does_not_fit_is_sent_away_with_both_values_and_the_room_stays(make, first, other, said):
    nodes = make()
    if first == "room":
        nodes.sender.expect(9, WEIGHTS, LAST)
    nodes.join(9, **other)
    if first == "node":
        wait_until(lambda: nodes.sender._waiting)
        nodes.sender.expect(9, WEIGHTS, LAST)
    nodes.until(lambda: nodes.took)
    assert said in nodes.took.pop().why
    nodes.until(lambda: nodes.gave)
    assert isinstance(nodes.gave[0], SentAway)
    assert said in nodes.gave.pop().why
    visit = nodes.join(9)
    nodes.until(lambda: Welcomed(visit) in nodes.took)
    assert nodes.gave == [Joined(9, 0)]


def test_who_waited_and_went_is_forgotten_and_the_next_one_is_let_in(make):
    nodes = make()
    gone = nodes.join(9)
    wait_until(lambda: nodes.sender._waiting)
    nodes.receiver.leave(gone, satisfied=False)
    wait_until(lambda: not nodes.sender._talks)
    assert not nodes.sender._waiting
    nodes.meet(9)
    assert nodes.gave == [Joined(9, 0)]


def test_who_waits_and_falls_silent_is_gone(make):
    nodes = make(Patience(silence=0.4, meeting=60))
    route = nodes.sender._bootstrap.route()
    with socket.create_connection(("127.0.0.1", route["rank_port"])) as stopped:
        Framed(stopped).send(Say.HELLO, hello(nodes, 9))
        wait_until(lambda: nodes.sender._waiting)
        wait_until(lambda: not nodes.sender._waiting)
    nodes.meet(9)
    assert nodes.gave == [Joined(9, 0)]


def test_a_decode_node_that_stands_still_says_who_it_is_before_it_says_that_it_lives(make, monkeypatch):
    nodes = make(Patience(silence=0.4))
    plain = Terms.plain

    def slow(self):
        threading.Event().wait(0.3)  # three pulses
        return plain(self)

    monkeypatch.setattr(Terms, "plain", slow)
    nodes.meet(1)


def test_who_had_all_before_its_room_came_is_remembered_as_long_as_it_might_come(make):
    nodes = make(Patience(silence=20, meeting=0.2))
    nodes.receiver.leave(nodes.join(1, 96), satisfied=True)
    wait_until(lambda: not nodes.sender._talks and nodes.sender._waiting)
    nodes.sender.expect(1, WEIGHTS, LAST)
    assert nodes.sender.take() == [Joined(1, 96), Satisfied(1)]
    nodes.receiver.leave(nodes.join(2, 96), satisfied=True)
    wait_until(lambda: not nodes.sender._talks and nodes.sender._waiting)
    threading.Event().wait(0.25)
    nodes.join(3)
    wait_until(lambda: list(nodes.sender._waiting) == [3])


def test_a_decode_node_that_waited_long_is_told_that_nobody_came(make):
    nodes = make(Patience(silence=0.4, meeting=0.6))  # it says that it is alive meanwhile
    nodes.join(1)
    nodes.until(lambda: nodes.took)
    assert "no request came to the prefill node for room 1 within 0.6 s" in nodes.took[0].why


def test_whoever_resumes_nowhere_is_turned_away_and_the_room_stays(make):
    nodes = make()
    nodes.sender.expect(1, WEIGHTS, LAST)
    nodes.join(1, start=-(2**70))
    nodes.until(lambda: nodes.took)
    visit = nodes.join(1)
    nodes.until(lambda: Welcomed(visit) in nodes.took)
    assert nodes.gave == [Joined(1, 0)]


def test_nodes_that_are_not_alike_do_not_even_connect(make):
    nodes = make(theirs=replace(TERMS, page_size=64, kv_cache_dtype="bfloat16"))
    nodes.join(1)
    nodes.until(lambda: nodes.took)
    (parted,) = nodes.took
    assert "page_size is 64 on the decode node and 16 on the prefill node" in parted.why
    assert "kv_cache_dtype is 'bfloat16' on the decode node and 'float32' on the prefill node" in parted.why
    assert nodes.gave == []


def test_a_prefill_node_that_is_not_there_or_gives_up_ends_the_visit_with_the_reason(make):
    nodes = make()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    nodes.join(1, port=port)
    nodes.until(lambda: nodes.took)
    assert f"127.0.0.1:{port} is lost" in nodes.took.pop().why
    visit = nodes.meet(2)
    nodes.offer(2, 5, 0, 4)
    nodes.read(visit, 1, 0, 4)
    nodes.read(visit, 2, 4, 8)
    nodes.until(lambda: Done(1) in nodes.told)
    nodes.until(lambda: Arrived(2, (5,)) in nodes.gave)
    assert nodes.sender.end(2, "it was aborted") == []
    nodes.until(lambda: Failed(2) in nodes.told)
    nodes.until(lambda: len(nodes.took) == 2)
    assert nodes.took[1].why.endswith("refuses room 2: it was aborted")
    nodes.read(visit, 3, 0, 4)
    nodes.until(lambda: Failed(3) in nodes.told)


def test_a_decode_node_that_goes_away_frees_the_prefill_node(make):
    nodes = make()
    visit = nodes.meet(2)
    nodes.offer(2, 7, 0, 4)
    nodes.read(visit, 1, 0, 8)
    nodes.receiver.leave(visit, satisfied=False)
    nodes.until(lambda: Failed(1) in nodes.told)
    nodes.until(lambda: any(isinstance(event, Left) for event in nodes.gave))
    assert nodes.sender.end(2) == [7]
    assert nodes.news.under_way == 0
    nodes.meet(2)  # the room is free again


def test_who_ends_a_room_is_told_of_all_that_nobody_else_was_told_of(make):
    nodes = make()
    visit = nodes.meet(1)
    for ident in (4, 5):
        nodes.offer(1, ident, 4 * ident, 4 * ident + 4)
    nodes.read(visit, 1, 16, 20)
    for _ in range(1000):  # as an engine that gives and does not look at what arrived
        nodes.woken.clear()
        nodes.sender.pump()
        nodes.told += nodes.news.take()[0].events
        if nodes.told:
            break
        nodes.woken.wait(0.05)
    assert nodes.told == [Done(1)]
    assert sorted(nodes.sender.end(1, "the device was lost")) == [4, 5]
    assert nodes.sender.take() == []


def test_what_will_not_come_fails_and_the_rest_comes(make):
    nodes = make()
    visit = nodes.meet(1)
    nodes.read(visit, 1, 0, 4)
    nodes.read(visit, 2, 3, 4, "state")
    nodes.offer(1, 1, 0, 4)
    nodes.sender.computed(1)
    nodes.until(lambda: {Done(1), Failed(2)} == set(nodes.told))
    assert same(nodes, 0, 4)


def test_what_comes_of_a_move_that_failed_is_not_written_where_others_are_by_now(make):
    nodes = make()
    visit = nodes.meet(1)
    nodes.read(visit, 1, 0, 8)
    nodes.offer(1, 1, 0, 4)
    nodes.sender.computed(1)  # so that half of it is missing, which is said before the other half comes
    nodes.until(lambda: Arrived(1, (1,)) in nodes.gave)
    assert nodes.told == [Failed(1)]
    assert nodes.receiver.stats.pages == 4
    assert not nodes.host["full"].any()


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_was_read_for_a_decode_node_that_is_gone_takes_no_room(make, when):
    nodes = make(Patience(silence=0.5))
    nodes.sender.expect(1, WEIGHTS, LAST)
    route = nodes.sender._bootstrap.route()
    with socket.create_connection(("127.0.0.1", route["rank_port"])) as stopped:  # it says hello, and takes nothing
        wire = Framed(stopped)
        wire.send(Say.HELLO, hello(nodes, 1))
        wire.send(Say.WANT, pages_said([("full", name(i % PAGES)) for i in range(4000)]))
        nodes.until(lambda: Joined(1, 0) in nodes.gave)
        if when == "after":
            stopped.close()
            nodes.until(lambda: any(isinstance(event, Left) for event in nodes.gave))
        nodes.offer(1, 1, 0, PAGES)
        nodes.sender.pump()
        nodes.until(lambda: any(isinstance(event, Left) for event in nodes.gave))
    nodes.sender.end(1)
    nodes.until(lambda: nodes.sender.queued == 0)


def test_a_device_that_cannot_be_read_ends_the_room_and_no_other(make):
    nodes = make()
    first, second = nodes.meet(1), nodes.meet(2)
    nodes.copies["state"].fails = True
    for number, visit, kind in ((1, first, "state"), (2, second, "full")):
        nodes.offer(number, number, 0, 4, kind)
        nodes.read(visit, number, 0, 4, kind)
    nodes.until(lambda: {Failed(1), Done(2)} == set(nodes.told))
    nodes.until(lambda: any(isinstance(event, Left) and event.room == 1 for event in nodes.gave))


def test_a_prefill_node_that_falls_silent_is_dead_after_the_deadline(make):
    nodes = make(Patience(silence=0.4))
    # A service that answers, and a door that opens and says nothing, as of a process that was stopped.
    with socket.create_server(("127.0.0.1", 0)) as door:
        said = {**nodes.sender._bootstrap.route(), "rank_port": door.getsockname()[1]}
        nodes.sender._bootstrap.register(said)
        nodes.join(1)
        nodes.until(lambda: nodes.took)
    assert "is lost: timed out" in nodes.took[0].why


def test_a_prefill_node_that_was_started_again_is_told_apart(make):
    nodes = make()
    nodes.sender._bootstrap.register({**nodes.sender._bootstrap.route(), "node": "the one before"})
    nodes.sender.expect(1, WEIGHTS, LAST)
    nodes.join(1)
    nodes.until(lambda: nodes.took)
    assert "started again" in nodes.took[0].why


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", ["giving", "taking"])
def test_a_wire_that_breaks_ends_rooms_and_never_gives_other_bytes(make, side, seed):
    faults = WireFaults(delay=0.05, cut=0.004, corrupt=0.004, hang=0.002)
    wires = FaultyWires(faults, seed)
    nodes = make(Patience(silence=0.3), **{side: wires})
    for number in range(1, 100):
        if number > 12 and any(wires.seen[fault] for fault in ("cut", "corrupt", "hang")):
            break  # how much is sent depends on time, and so which frame meets a fault
        nodes.sender.expect(number, WEIGHTS, LAST)
        visit = nodes.join(number)
        nodes.host["full"][:] = 0
        nodes.until(lambda visit=visit: any(event.visit == visit for event in nodes.took))
        nodes.offer(number, number, 0, PAGES)
        moves = {i: range(i % 3 * 30, i % 3 * 30 + 30) for i in range(3 * number, 3 * number + 3)}
        for ident, pages in moves.items():
            nodes.read(visit, ident, pages.start, pages.stop)
        nodes.until(lambda moves=moves: {event.move for event in nodes.told} >= set(moves))
        for ident, pages in moves.items():
            assert Failed(ident) in nodes.told or same(nodes, pages.start, pages.stop)
        assert len(nodes.told) == 3 * number, "each is told once"
        nodes.receiver.leave(visit, satisfied=Done(3 * number) in nodes.told)
        if Welcomed(visit) in nodes.took:  # else it may never have heard of the decode node
            nodes.until(lambda n=number: any(isinstance(e, Left | Satisfied) and e.room == n for e in nodes.gave))
        nodes.sender.end(number)
    assert any(wires.seen[fault] for fault in ("cut", "corrupt", "hang"))
    assert any(isinstance(event, Done) for event in nodes.told)
    assert nodes.news.under_way == 0
