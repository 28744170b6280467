"""KV events over ZMQ, for routers that know whose cache has what: vLLM's and SGLang's publisher, by their settings.

A message is ``topic | number (8 bytes, big-endian) | msgpack of [seconds since 1970, events, data parallel rank]``; an
event is its name and its fields in their order (``cache/journal.py``), a page's name cut to a number, as they do.
Whoever missed some asks at ``replay_endpoint`` for those from a number on, of the newest ``buffer_steps``. Nobody is
waited for: what finds the queue full is dropped, and its number with it, so that readers notice.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from rootcellar.cache import AllBlocksCleared, BlockStored, KVEvent
from rootcellar.errors import ConfigError
from rootcellar.tiers.settings import need

log = logging.getLogger(__name__)

_END = (-1).to_bytes(8, "big", signed=True)
"""Instead of a number: there are no more to replay."""
_LOOK = 0.05
"""Seconds after which whoever asks for a replay is seen."""


@dataclass(frozen=True, slots=True)
class EventSettings:
    """``--kv-events-config``, by SGLang's and vLLM's names; ``publisher``: ``"zmq"``, or None: nothing is published."""

    publisher: str | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""

    @classmethod
    def read(cls, text: str) -> EventSettings:
        """The settings that a JSON object gives. Raises ``ConfigError`` for anything else."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"kv_events_config is no JSON: {error}") from None
        known = [field.name for field in fields(cls)]
        if isinstance(given, dict):
            given.pop("enable_kv_cache_events", None)  # vLLM's, which says what publisher does
        if not isinstance(given, dict) or not given.keys() <= set(known):
            raise ConfigError(f"kv_events_config must be an object with some of {', '.join(known)}")
        settings = cls(**given)
        texts = settings.endpoint, settings.topic, settings.replay_endpoint or "", settings.publisher or ""
        counts = settings.buffer_steps, settings.hwm, settings.max_queue_size
        if not all(isinstance(each, str) for each in texts) or not all(
            type(each) is int and each > 0 for each in counts
        ):
            raise ConfigError("kv_events_config: addresses and the topic are strings, all else are numbers above 0")
        if settings.publisher not in (None, "null", "zmq"):
            raise ConfigError(f"kv_events_config: publisher={settings.publisher!r} is not allowed: 'zmq', or null")
        return settings


def number_of(name: bytes) -> int:
    """A page's name as readers know it: its last eight bytes, big-endian, as vLLM's, in a number that no type is too
    narrow for (SGLang's have a sign, vLLM's have none).
    """
    return int.from_bytes(name[-8:], "big") & (1 << 63) - 1


def words_of(event: KVEvent) -> list[Any]:
    """What is packed of an event."""
    if isinstance(event, AllBlocksCleared):
        return [type(event).__name__]
    hashes, *others = astuple(event)
    if isinstance(event, BlockStored) and event.parent_block_hash is not None:
        others[0] = number_of(event.parent_block_hash)
    return [type(event).__name__, [*map(number_of, hashes)], *others]


class EventPublisher:
    """Publishes from a thread of its own."""

    def __init__(self, settings: EventSettings) -> None:
        """Open the sockets. Raises ``ConfigError``: that cannot be, or a package is missing."""
        self._zmq: Any = need("zmq", "rootcellar[events]", "kv_events_config")
        self._pack = need("msgspec", "rootcellar[events]", "kv_events_config").msgpack.encode
        self._topic = settings.topic.encode()
        self._queue: queue.Queue[tuple[int, float, Sequence[KVEvent]] | None] = queue.Queue(settings.max_queue_size)
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=settings.buffer_steps)
        self._number = 0
        self.dropped = 0
        """Messages that found the queue full."""
        context = self._zmq.Context()
        self._context = context
        try:
            self._socket = self._open(context, self._zmq.PUB, settings.endpoint, settings.hwm)
            replay = settings.replay_endpoint
            self._replay = None if replay is None else self._open(context, self._zmq.ROUTER, replay, settings.hwm)
        except self._zmq.ZMQError as error:
            context.destroy(linger=0)
            raise ConfigError(f"kv_events_config: {settings.endpoint} or the replay_endpoint: {error}") from None
        self._thread = threading.Thread(target=self._run, name="rootcellar-events", daemon=True)
        self._thread.start()

    def _open(self, context: Any, kind: int, endpoint: str, hwm: int) -> Any:
        opened = context.socket(kind)
        opened.set_hwm(hwm)
        # As vLLM's: what names a place of this machine is listened on, anything else is connected to.
        here = "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))
        here = here or kind == self._zmq.ROUTER or endpoint.startswith(("tcp://127.0.0.1", "tcp://localhost"))
        (opened.bind if here else opened.connect)(endpoint)
        return opened

    @property
    def endpoint(self) -> str:
        """Where it listens, or whom it connected to."""
        return str(self._socket.getsockopt_string(self._zmq.LAST_ENDPOINT))

    @property
    def replay_endpoint(self) -> str | None:
        """Where replays are asked for."""
        return None if self._replay is None else str(self._replay.getsockopt_string(self._zmq.LAST_ENDPOINT))

    def publish(self, events: Sequence[KVEvent]) -> None:
        """Send these in one message, soon. From one thread."""
        number, self._number = self._number, self._number + 1
        try:
            self._queue.put_nowait((number, time.time(), events))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Send what waits, and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=None if self._replay is None else _LOOK)
            except queue.Empty:
                self._answer()
                continue
            if item is None:
                break
            try:
                self._send(*item)
                self._answer()
            except Exception:  # its number is missing, as that of what was dropped
                log.exception("KV events could not be sent")
        self._context.destroy(linger=500)

    def _send(self, number: int, at: float, events: Sequence[KVEvent]) -> None:
        words = [words_of(event) for event in events]
        message = self._pack([at, words, 0])
        self._sent.append((number, message))
        self._socket.send_multipart([self._topic, number.to_bytes(8, "big"), message])

    def _answer(self) -> None:
        """Send again what somebody asks for."""
        while self._replay is not None and self._replay.poll(0):
            parts = self._replay.recv_multipart()
            if len(parts) != 3 or len(parts[2]) != 8:
                log.warning("somebody asks for a replay of KV events and does not say from where on")
                continue
            first = int.from_bytes(parts[2], "big")
            for number, message in self._sent:
                if number >= first:
                    self._replay.send_multipart([parts[0], b"", number.to_bytes(8, "big"), message])
            self._replay.send_multipart([parts[0], b"", _END, b""])
