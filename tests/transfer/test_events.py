"""KV events as routers read them: by numbers, from the wire and again from the replay."""

import json
import threading
from dataclasses import replace

import pytest

import rootcellar
from rootcellar.cache import AllBlocksCleared, BlockStored
from rootcellar.errors import ConfigError
from rootcellar.transfer.events import EventPublisher, EventSettings, number_of

zmq = pytest.importorskip("zmq", reason="needs pyzmq, of requirements/lock.txt")
msgspec = pytest.importorskip("msgspec", reason="needs msgspec, of requirements/lock.txt")

HERE = {"publisher": "zmq", "endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*"}


class Stored(msgspec.Struct, array_like=True, tag="BlockStored"):
    """As vLLM declares it."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class Removed(msgspec.Struct, array_like=True, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class Cleared(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None = None


decode = msgspec.msgpack.Decoder(Batch).decode


@pytest.fixture
def sockets():
    context = zmq.Context()
    yield context.socket
    context.destroy(linger=0)


def replayed(socket, first=0):
    """The numbers and the messages that somebody gets who asks for those from ``first`` on."""
    socket.send_multipart([b"", first.to_bytes(8, "big")])
    found = []
    while True:
        assert socket.poll(10_000)
        _, number, message = socket.recv_multipart()
        if number == (-1).to_bytes(8, "big", signed=True):
            return found
        found.append((int.from_bytes(number, "big"), decode(message)))


def stored(i):
    return BlockStored((bytes([i]) * 32,), None, (i,), 1, None, "GPU", None, (None,), 0, "full_attention", None)


def test_messages_are_numbered_and_those_that_were_missed_are_sent_again(sockets):
    publisher = EventPublisher(EventSettings.read(json.dumps({**HERE, "topic": "kv", "buffer_steps": 4})))
    listener, asker = sockets(zmq.SUB), sockets(zmq.DEALER)
    listener.subscribe(b"kv")
    listener.connect(publisher.endpoint)
    asker.connect(publisher.replay_endpoint)
    for number in range(200):  # until the subscription is there: what comes before it is missed
        publisher.publish([stored(number % 256), AllBlocksCleared()])
        if listener.poll(20):
            break
    topic, seen, message = listener.recv_multipart()
    batch = decode(message)
    assert topic == b"kv"
    assert batch.events[0].block_hashes == [number_of(bytes([int.from_bytes(seen, "big") % 256]) * 32)]
    assert isinstance(batch.events[1], Cleared)
    for _ in range(5):
        publisher.publish([stored(7)])
    last = number + 5
    while (found := replayed(asker))[-1][0] < last:
        pass
    assert [each for each, _ in found] == list(range(last - 3, last + 1))
    assert [each for each, _ in replayed(asker, last)] == [last]
    publisher.close()


def test_a_full_queue_costs_a_number_and_nobodys_time(sockets):
    publisher = EventPublisher(EventSettings.read(json.dumps({**HERE, "max_queue_size": 1})))
    asker = sockets(zmq.DEALER)
    asker.connect(publisher.replay_endpoint)
    held, sending = threading.Event(), publisher._pack
    publisher._pack = lambda words: (held.wait(10), sending(words))[1]
    for i in range(5):
        publisher.publish([stored(i)])
    assert publisher.dropped >= 3
    held.set()
    assert replayed(asker)[0][0] == 0
    publisher.close()


def test_what_cannot_be_said_costs_a_number_and_no_other(sockets):
    publisher = EventPublisher(EventSettings.read(json.dumps(HERE)))
    asker = sockets(zmq.DEALER)
    asker.connect(publisher.replay_endpoint)
    publisher.publish([replace(stored(1), token_ids=(object(),))])
    publisher.publish([stored(2)])
    while not (found := replayed(asker)):
        pass
    assert [number for number, _ in found] == [1]
    publisher.close()


def test_an_engine_tells_of_what_it_caches(tiny_folder, sockets):
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=256, max_running_requests=1, kv_events_config=json.dumps(HERE)
    ) as engine:
        asker = sockets(zmq.DEALER)
        asker.connect(engine._parts.events.replay_endpoint)
        prompt = list(range(40))
        engine.generate(input_ids=prompt, cache_salt="a", sampling_params={"temperature": 0, "max_new_tokens": 2})
        engine.flush_cache()
        events = []
        while not events or not isinstance(events[-1], Cleared):
            events = [event for _, batch in replayed(asker) for event in batch.events]
        told = [event for event in events if isinstance(event, Stored)]
        assert [hash for event in told for hash in event.block_hashes] == [
            number_of(bytes.fromhex(name)) for name in engine.prefixes.names(prompt, cache_salt="a")
        ]
        assert all(0 <= hash < 1 << 63 for event in told for hash in event.block_hashes)
        assert [token for event in told for token in event.token_ids][:32] == prompt[:32]
        assert {(event.medium, event.block_size) for event in told} == {("GPU", 16)}
        assert told[0].parent_block_hash is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("no json", "is no JSON"),
        ("[]", "must be an object"),
        ('{"port": 1}', "must be an object with some of publisher"),
        ('{"publisher": "kafka"}', "publisher='kafka'"),
        ('{"hwm": 0}', "numbers above 0"),
        ('{"topic": 3}', "strings"),
    ],
)
def test_settings_are_checked(wrong, said):
    with pytest.raises(ConfigError, match=said):
        EventSettings.read(wrong)
    assert EventSettings.read('{"enable_kv_cache_events": true}').publisher is None


def test_a_place_that_is_taken_is_said():
    publisher = EventPublisher(EventSettings.read(json.dumps({**HERE, "replay_endpoint": None})))
    with pytest.raises(ConfigError, match="Address already in use"):
        EventPublisher(EventSettings(publisher="zmq", endpoint=publisher.endpoint))
    publisher.close()
