"""Redis, Valkey, and what else speaks their protocol (RESP 2): each page is one string.

The client is our own: images go from and into the guard's memory without a copy in between. A page that is put again
replaces what is there, so what was damaged is mended. What the server evicts or forgets is a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from rootcellar.errors import ConfigError
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.settings import HIDDEN, nothing_else, take_optional, take_text
from rootcellar.tiers.store import check_names
from rootcellar.tiers.stores.wire import Address, Wire, Wires

_T = TypeVar("_T")
_AT_ONCE = 128
"""Commands that are sent before their answers are read."""
_KNOWN = "url, username, password, ca_certs, prefix, ttl, timeout"


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """Of a Redis store."""

    address: Address
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    prefix: str = "rootcellar:"
    """Of all keys; names follow in hexadecimal."""
    ttl: int | None = None
    """Seconds after which the server forgets a page; None: when it lacks room, if its policy is to evict."""


def read_settings(extra: Mapping[str, object]) -> RedisSettings:
    """What ``--hicache-storage-backend-extra-config`` says of a Redis store. Raises ``ConfigError``."""
    own = dict(extra)
    url = take_text(own, "url", "redis://127.0.0.1:6379")
    wrong = "url is not allowed: write redis://host:port/db, rediss://host:port/db (TLS) or unix:///path?db=0"
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
        db = parts.query.removeprefix("db=") if parts.scheme == "unix" else parts.path.strip("/")
        number = int(db or 0)
    except ValueError:
        raise ConfigError(wrong) from None
    if parts.scheme not in ("redis", "rediss", "unix") or not (parts.hostname or parts.scheme == "unix") or number < 0:
        raise ConfigError(wrong)
    ca_certs = take_optional(own, "ca_certs")
    if ca_certs is not None and parts.scheme != "rediss":
        raise ConfigError("ca_certs is of no use without TLS: begin url with rediss://")
    username, password = take_optional(own, "username"), take_optional(own, "password", secret=True)
    settings = RedisSettings(
        Address(
            parts.hostname or "",
            port,
            path=parts.path if parts.scheme == "unix" else None,
            timeout=positive(own, "timeout", 5.0),
            tls=parts.scheme == "rediss",
            ca_certs=ca_certs,
        ),
        db=number,
        username=username or unquote(parts.username or "") or None,
        password=password or unquote(parts.password or "") or None,
        prefix=take_text(own, "prefix", "rootcellar:"),
        ttl=None if own.setdefault("ttl") is None else int(positive(own, "ttl", 1, whole=True)),
    )
    own.pop("ttl", None)
    nothing_else(own, "redis", _KNOWN)
    return settings


class _ErrorReply(OSError):
    """The server answered with an error."""


class RedisStore:
    """A :class:`~rootcellar.tiers.store.Store` on a Redis server."""

    verifies = False

    def __init__(self, settings: RedisSettings) -> None:
        """Raises ``ConfigError``: the server is not there, or does not let us in."""
        self.settings = settings
        self._prefix = settings.prefix.encode()
        self._ttl = () if settings.ttl is None else (b"EX", b"%d" % settings.ttl)
        self._wires = Wires(settings.address, self._greet)
        try:
            self._wires.run(lambda wire: _ask(wire, [(b"PING",)], _said))
        except OSError as error:
            raise ConfigError(f"the redis store at {settings.address} cannot be used: {error}") from None

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names)
        commands = [(b"EXISTS", self._key(name)) for name in names]
        return [answer == b"1" for answer in self._wires.run(lambda wire: _ask(wire, commands, _said))]

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, into)
        commands = [(b"GET", self._key(name)) for name in names]

        def ask(wire: Wire) -> list[bool]:
            views = iter(into)
            return _ask(wire, commands, lambda wire: _fill(wire, next(views)))

        return self._wires.run(ask)

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``; False where the server has no room. Raises ``OSError``."""
        check_names(names, blocks)
        commands = [(b"SET", self._key(name), block, *self._ttl) for name, block in zip(names, blocks, strict=True)]
        return self._wires.run(lambda wire: _ask(wire, commands, _kept))

    def clear(self) -> int:
        """See ``Store``: every key with our prefix. Raises ``OSError``."""
        return self._wires.run(lambda wire: sum(_unlink(wire, keys) for keys in self._scan(wire)))

    def register(self, _buffer: memoryview) -> None:
        """Nothing comes of it."""

    def close(self) -> None:
        """See ``Store``."""
        self._wires.close()

    def _key(self, name: bytes) -> bytes:
        return self._prefix + name.hex().encode()

    def _greet(self, wire: Wire) -> None:
        settings = self.settings
        if settings.password is not None:
            user = (settings.username.encode(),) if settings.username else ()
            try:
                _ask(wire, [(b"AUTH", *user, settings.password.encode())], _said)
            except _ErrorReply as error:  # a server that has no such command repeats what it was given
                raise _ErrorReply(str(error).replace(settings.password, HIDDEN)) from None
        if settings.db:
            _ask(wire, [(b"SELECT", b"%d" % settings.db)], _said)

    def _scan(self, wire: Wire) -> Iterator[list[bytes]]:
        pattern = "".join(f"\\{c}" if c in "*?[]\\^-" else c for c in self.settings.prefix).encode() + b"*"
        cursor = b"0"
        while True:
            ((cursor, keys),) = _ask(wire, [(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"1000")], _page_of_keys)
            if keys:
                yield keys
            if cursor == b"0":
                return


def open_store(extra: Mapping[str, object], _identity: str) -> RedisStore:
    """See ``registry``."""
    return RedisStore(read_settings(extra))


# --- the protocol -----------------------------------------------------------------------------------------------------


def _ask(wire: Wire, commands: Sequence[Sequence[bytes | memoryview]], read: Callable[[Wire], _T]) -> list[_T]:
    """Send commands, and ``read`` the answer to each. What the server refuses is raised after all were read."""
    answers: list[_T] = []
    refused: _ErrorReply | None = None
    for start in range(0, len(commands), _AT_ONCE):
        some = commands[start : start + _AT_ONCE]
        parts: list[bytes | memoryview] = []
        for command in some:
            parts.append(b"*%d\r\n" % len(command))
            for word in command:
                parts += (b"$%d\r\n" % memoryview(word).nbytes, word, b"\r\n")
        wire.send(parts)
        for _ in some:
            try:
                answers.append(read(wire))
            except _ErrorReply as error:
                refused = refused or error
        if refused is not None:
            raise refused
    return answers


def _said(wire: Wire) -> bytes:
    """A line: a status or a number."""
    line = wire.line()
    if line[:1] == b"-":
        raise _ErrorReply(f"the server answered: {line[1:].decode('utf-8', 'replace')}")
    if line[:1] not in (b"+", b":"):
        raise OSError(f"the server answered with {line[:1]!r}, not with a status or a number")
    return line[1:]


def _kept(wire: Wire) -> bool:
    try:
        return _said(wire) == b"OK"
    except _ErrorReply as error:
        if "OOM" in str(error):  # its memory is full, and it may not evict
            return False
        raise


def _length(wire: Wire, kind: bytes = b"$") -> int:
    """Of a string (-1: there is none) or, ``*``, of a list."""
    line = wire.line()
    if line[:1] == b"-":
        raise _ErrorReply(f"the server answered: {line[1:].decode('utf-8', 'replace')}")
    if line[:1] != kind:
        raise OSError(f"the server answered with {line[:1]!r}, not with {kind!r}")
    return int(line[1:])


def _fill(wire: Wire, view: memoryview) -> bool:
    """A string into ``view``, where it has its length."""
    length = _length(wire)
    if length < 0:
        return False
    whole = length == view.nbytes
    if whole:
        wire.into(view.cast("B"))
    else:
        wire.skip(length)
    wire.skip(2)
    return whole


def _text(wire: Wire) -> bytes:
    text = wire.exactly(_length(wire))
    wire.skip(2)
    return text


def _page_of_keys(wire: Wire) -> tuple[bytes, list[bytes]]:
    if _length(wire, b"*") != 2:
        raise OSError("the server answered to SCAN with another list")
    return _text(wire), [_text(wire) for _ in range(_length(wire, b"*"))]


def _unlink(wire: Wire, keys: Sequence[bytes]) -> int:
    return int(_ask(wire, [(b"UNLINK", *keys)], _said)[0])
