"""Frames over a socket: whole or not at all."""

import socket
import threading

import numpy as np
import pytest

from rootcellar.transfer.talk import Say, indices_of, pages_read, pages_said
from rootcellar.transfer.wires.tcp import Framed, WireError


@pytest.fixture
def pair():
    """Two sockets that are connected, with a deadline."""
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(5)
    yield ends
    for end in ends:
        end.close()


def test_frames_arrive_in_order_and_their_bytes_go_where_they_are_wanted(pair):
    here, there = map(Framed, pair)
    images = np.arange(3 * 200_001, dtype=np.uint32).view(np.uint8).reshape(3, -1)

    def send():
        here.send(Say.HELLO, b"who")
        here.send(Say.PAGES, b"two", [images[0].data, images[2].data])
        here.send(Say.PAGES, b"none", [b""])
        here.send(Say.PULSE)

    thread = threading.Thread(target=send)
    thread.start()
    first = there.receive()
    assert (first.kind, first.says, first.nbytes) == (Say.HELLO, b"who", 0)
    second = there.receive()
    into = np.zeros_like(images)
    there.fill(second, [memoryview(into[2]), memoryview(into[0])])
    assert np.array_equal(into, [images[2], np.zeros_like(images[1]), images[0]])
    assert there.receive().says == b"none"
    assert there.receive().kind == Say.PULSE
    thread.join()
    here.close()
    with pytest.raises(ConnectionError):
        there.receive()


@pytest.mark.parametrize("at", [0, 4, 6, 8, 10, 12, 16, 24, 33, 40, 44])
def test_a_bit_that_was_changed_anywhere_is_noticed(pair, at):
    recorded, there = [], Framed(pair[1])

    class Recording:
        def sendmsg(self, buffers):
            recorded.append(b"".join(buffers))
            return len(recorded[-1])

    Framed(Recording()).send(Say.PAGES, b"page", [b"0123456789"])
    frame = bytearray(b"".join(recorded))
    frame[at] ^= 1
    pair[0].sendall(frame)  # and the other side waits for no more than that
    into = bytearray(10)
    with pytest.raises(WireError):
        there.fill(there.receive(), [memoryview(into)])


def test_what_nobody_asked_for_is_not_taken(pair):
    here, there = map(Framed, pair)
    here.send(Say.PAGES, b"", [b"more than there is room for"])
    with pytest.raises(WireError, match="nobody asked for"):
        there.fill(there.receive(), [memoryview(bytearray(4))])
    pair[0].sendall(b"GET /route HTTP/1.1\r\nHost: wrong door\r\n\r\n")
    with pytest.raises(WireError, match="another protocol"):
        Framed(pair[1]).receive()


def test_whoever_says_nothing_is_given_up(pair):
    pair[1].settimeout(0.01)
    with pytest.raises(TimeoutError):
        Framed(pair[1]).receive()


def test_pages_are_said_by_runs_of_a_kind():
    pages = [("full", bytes([i]) * 32) for i in range(5)] + [("window", bytes(32)), ("full", bytes([9]) * 32)]
    said = pages_said(pages)
    assert pages_read(said) == pages
    assert pages_read(pages_said([])) == []
    for wrong in (said[:-1], said + b"0", said[:3], b"\xff" * 12):
        with pytest.raises(WireError):
            pages_read(wrong)
    assert indices_of(np.array([0, 4], "<u4").tobytes(), 5).tolist() == [0, 4]
    for wrong in (b"123", np.array([5], "<u4").tobytes()):
        with pytest.raises(WireError):
            indices_of(wrong, 5)
