"""What ranks say to each other: who is heard, what is understood, and when somebody is lost."""

import os
import pickle
import socket
import threading

import numpy as np
import pytest

from rootcellar.engine import meeting
from rootcellar.engine.agreeing import Seen
from rootcellar.engine.exchange import Farewell, FrameKind, Link, Star, _load
from rootcellar.engine.meeting import _accept, _connect, _Group
from rootcellar.engine.requests import InputItem
from rootcellar.errors import EngineError
from rootcellar.sampling_params import SamplingParams


def two(timeout=60.0):
    """Stars of two ranks, connected."""
    ends = _loopback()
    return [Star(rank, 2, [Link(ends[rank], timeout, 1 - rank)], timeout) for rank in range(2)]


def _loopback():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


def heard(star):
    """What is led to a rank, in order, and an event for its end."""
    led, over, news = [], threading.Event(), threading.Event()
    star.listen(led=led.append, news=news.set, lost=lambda why: over.set())
    return led, over, news


def test_words_arrive_in_order_also_those_before_anybody_listened():
    leader, follower = two()
    for i in range(100):
        leader.lead(Seen((i,)))
    follower.say(Seen((7,), (8,)))
    assert leader.gather() == [Seen((7,), (8,))]
    leader.tell("agreed")
    assert follower.hear() == "agreed"
    led, over, _ = heard(follower)
    _, _, news = heard(leader)
    follower.news()
    assert news.wait(30)
    leader.close("rank 0 was shut down", in_order=True)
    assert over.wait(30)
    assert led == [Seen((i,)) for i in range(100)]
    assert follower.in_order
    assert follower.ended(30) == "rank 0 of 2 ended: rank 0 was shut down"
    for wait in (follower.hear, leader.gather, lambda: leader.lead("more")):
        with pytest.raises(EngineError, match="was shut down"):
            wait()


def test_who_waits_for_a_rank_that_is_gone_is_told():
    ends = _loopback()
    star = Star(0, 2, [Link(ends[0], 60.0, 1)], 60.0)
    ends[1].close()
    with pytest.raises(EngineError, match="rank 1 of 2 is lost: its connection ended"):
        star.gather()
    assert not star.in_order


def test_a_rank_that_is_silent_is_lost():
    ends = _loopback()
    star = Star(0, 2, [Link(ends[0], 0.2, 1)], 0.2)
    _, over, _ = heard(star)
    assert over.wait(30)
    with pytest.raises(EngineError, match=r"nothing was heard of it for 0.2 s \(dist_timeout\)"):
        star.gather()
    ends[1].close()


def test_ranks_that_live_are_not_lost_however_little_they_say():
    stars = two(timeout=0.5)
    overs = [heard(star)[1] for star in stars]
    assert not overs[0].wait(1.5)
    assert not overs[1].is_set()
    stars[0].close("the end")
    assert overs[1].wait(30)


def test_only_what_ranks_say_is_understood():
    item = InputItem(np.arange(5), SamplingParams(), frozenset({3}), 1, ("a",), None, 0, "")
    again = _load(pickle.dumps(item))
    assert again.sampling == item.sampling
    assert again.ids.tolist() == item.ids.tolist()
    for strange in (os.system, getattr, Star, _load):
        with pytest.raises(pickle.UnpicklingError, match="nothing that ranks say"):
            _load(pickle.dumps(strange))


def test_who_does_not_know_the_secret_is_not_heard():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address, secret = listener.getsockname(), bytes(range(32))
        found = []
        accepting = threading.Thread(target=lambda: found.extend(_accept(_Group(address, secret, listener, 0, 2))))
        accepting.start()
        with socket.create_connection(address) as stranger:
            stranger.sendall(bytes(32) + (1).to_bytes(2, "big"))
            stranger.settimeout(30)
            while stranger.recv(1024):
                pass  # until it is shown out
        assert accepting.is_alive()
        link = _connect(_Group(address, secret, None, 1, 2))
        accepting.join(30)
        assert [each.peer for each in found] == [1]
        found[0].send(FrameKind.SAY, "welcome")
        assert link.receive() == (FrameKind.SAY, "welcome")
        link.close(Farewell("bye"))
        found[0].close(Farewell("bye"))


def test_strangers_do_not_make_ranks_wait_longer(monkeypatch):
    monkeypatch.setattr(meeting, "_MEET", 1)
    said, over = [], threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            with pytest.raises(OSError, match="timed out") as error:
                _accept(_Group(listener.getsockname(), bytes(32), listener, 0, 2))
            said.append(error)
            over.set()

        threading.Thread(target=accept, daemon=True).start()
        for _ in range(40):
            socket.create_connection(listener.getsockname()).close()
            if over.wait(0.2):
                break
        assert said
