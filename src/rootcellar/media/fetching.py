"""Pictures by address: only from hosts that are named, and from no address inside whatever network this machine is in.

A name is resolved once, every address that it has is looked at, and one of those is connected to: what a name stands
for cannot change between the look and the connection. Each redirect is looked at as the first address is.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import urljoin, urlsplit

import httptools

from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.media.limits import MediaLimits

_IPAddress: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"

_PIECE = 1 << 16
_MOST_REDIRECTS = 3
_MOST_HEADERS = 1 << 16
_LONGEST = 4096
_REDIRECTS = (301, 302, 303, 307, 308)
# Addresses of IPv6 that stand for one of IPv4, as some networks reach the old world from the new.
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
# What an address may be written with; anything else is read in two ways by two programs.
_WRITTEN = re.compile(r"[!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]+")


def is_address(text: str) -> bool:
    """Whether a text is meant as one of HTTP."""
    return text[:8].lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class _Place:
    """What an address says: whom to ask, and for what."""

    secure: bool
    host: str
    port: int
    target: str

    @property
    def shown(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def fetch_now(url: str, limits: MediaLimits) -> bytes:
    """:func:`fetch`, for callers without an event loop, or with one that waits for them."""
    found: list[bytes | BaseException] = []

    def work() -> None:
        try:
            found.append(asyncio.run(fetch(url, limits)))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work, name="rootcellar-fetch")
    thread.start()
    thread.join()
    (outcome,) = found
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def fetch(url: str, limits: MediaLimits) -> bytes:
    """What is at an address of HTTP.

    Raises:
        RequestError: its host is not among ``allowed_media_domains``, or has a private address, or does not answer with
            200 within ``media_timeout``.
        RequestTooLarge: it is longer than ``max_image_bytes``.
    """
    try:
        async with asyncio.timeout(limits.media_timeout):
            for _ in range(_MOST_REDIRECTS + 1):
                place = _place_of(url, limits)
                answer = await _asked(place, limits)
                if answer.status not in _REDIRECTS:
                    return _content(answer, place)
                url = urljoin(url, answer.location)
            raise RequestError(f"an image's address leads on more than {_MOST_REDIRECTS} times")
    except TimeoutError:
        raise RequestError(
            f"an image did not come within {limits.media_timeout:g} seconds: send a data URL, or raise media_timeout"
        ) from None


def _place_of(url: str, limits: MediaLimits) -> _Place:
    """``RequestError``: it is no address, or one from where nothing may come."""
    wrong = "an image's address must be as https://example.com/image.png"
    if not is_address(url) or len(url) > _LONGEST or not _WRITTEN.fullmatch(url):
        raise RequestError(f"{wrong}, of at most {_LONGEST} characters of ASCII")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise RequestError(wrong) from None
    host = (parts.hostname or "").rstrip(".").lower()
    if not host or "@" in parts.netloc or port == 0:
        raise RequestError(f"{wrong}, without a name or password in it")
    secure = parts.scheme == "https"
    place = _Place(secure, host, port or (443 if secure else 80), _target(parts.path, parts.query))
    if not _is_named(place, limits.allowed_media_domains):
        where = ", ".join(limits.allowed_media_domains) or "nowhere"
        raise RequestError(
            f"images may not come from {place.shown!r}: send a data URL, or start with allowed_media_domains (they may "
            f"come from: {where})"
        )
    return place


def _target(path: str, query: str) -> str:
    return (path or "/") + (f"?{query}" if query else "")


def _is_named(place: _Place, domains: Sequence[str]) -> bool:
    """Whether a place is one of ``example.com``, ``*.example.com``, ``example.com:8080`` or ``*``."""
    usual = place.port == (443 if place.secure else 80)
    for domain in domains:
        host, port = _split(domain.lower().rstrip("."))
        if (port is None and not usual) or port not in (None, place.port):
            continue
        if host in ("*", place.host) or (host.startswith("*.") and place.host.endswith(host[1:])):
            return True
    return False


def _split(domain: str) -> tuple[str, int | None]:
    """Host and port, if it has one, of what a setting names; IPv6 in brackets, as in an address."""
    head, colon, port = domain.rpartition(":")
    if colon and port.isdecimal() and (":" not in head or head.startswith("[")):
        return head.strip("[]"), int(port)
    return domain.strip("[]"), None


def _is_public(address: _IPAddress) -> bool:
    """Whether it is one of the whole world, and of one machine."""
    if isinstance(address, ipaddress.IPv6Address):
        means = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _TRANSLATED else address.ipv4_mapped
        if means is not None:
            return _is_public(means)
        if not all(_is_public(each) for each in (address.sixtofour, *(address.teredo or ())) if each is not None):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def _address_of(place: _Place, domains: Sequence[str]) -> str:
    """The address to connect to. ``RequestError``: the name has none, or one that is not public.

    An address that is itself among the domains may be private: whoever starts the engine means it.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(place.host, place.port, proto=6)
    except (OSError, UnicodeError):
        raise RequestError(f"there is no host called {place.host[:80]!r}") from None
    addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
    named = {_split(domain)[0] for domain in domains}
    if not addresses or not all(_is_public(each) or str(each) in named for each in addresses):
        raise RequestError(f"images may not come from {place.host[:80]!r}: its address is a private one")
    return str(addresses[0])


async def _asked(place: _Place, limits: MediaLimits) -> _Reply:
    """What a place answers. ``RequestError``: nothing that can be read."""
    address = await _address_of(place, limits.allowed_media_domains)
    answer = _Reply(limits.max_image_bytes)
    try:
        # The certificate must be the name's, whatever was connected to.
        how = {"ssl": ssl.create_default_context(), "server_hostname": place.host} if place.secure else {}
        reader, writer = await asyncio.open_connection(address, place.port, **how)  # type: ignore[arg-type]
        try:
            lines = [f"GET {place.target} HTTP/1.1", f"Host: {place.shown}", "User-Agent: rootcellar"]
            lines += ["Accept: image/*", "Accept-Encoding: identity", "Connection: close", "", ""]
            writer.write("\r\n".join(lines).encode("ascii"))
            parser = httptools.HttpResponseParser(answer)
            while not answer.over and (some := await reader.read(_PIECE)):
                answer.read += len(some)
                parser.feed_data(some)
                answer.check()
                if answer.begun:
                    answer.status = parser.get_status_code()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    except (OSError, httptools.HttpParserError) as error:
        raise RequestError(f"{place.shown!r} does not answer: {str(error)[:120] or type(error).__name__}") from None
    return answer


def _content(answer: _Reply, place: _Place) -> bytes:
    if answer.status != 200:
        raise RequestError(f"{place.shown!r} answers {answer.status or 'nothing'} where an image should be")
    if not answer.over and answer.length not in (None, len(answer.body)):
        raise RequestError(f"{place.shown!r} ended before the image did")
    return bytes(answer.body)


class _Reply:
    """What comes of an answer, by httptools' callbacks."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.status = self.read = 0
        self.begun = self.over = False
        self.location = ""
        self.length: int | None = None
        self.body = bytearray()

    def check(self) -> None:
        """Raises ``RequestTooLarge`` as soon as more has come, or will come, than may."""
        if max(len(self.body), self.length or 0) > self._most:
            raise RequestTooLarge(
                f"an image of more than {self._most} bytes: send a smaller one, or raise max_image_bytes"
            )
        if not self.begun and self.read > _MOST_HEADERS:
            raise RequestError(f"the head of an answer has more than {_MOST_HEADERS} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"location":
            self.location = value.decode("latin-1")
        elif name.lower() == b"content-length" and value.isdigit() and len(value) < 20:
            self.length = int(value)

    def on_headers_complete(self) -> None:
        self.begun = True

    def on_body(self, some: bytes) -> None:
        if len(self.body) <= self._most:
            self.body += some

    def on_message_complete(self) -> None:
        self.over = True
