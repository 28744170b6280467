"""Images by address: from where they may come, and what a host there can do to whoever asks it."""

import asyncio
import contextlib
import ipaddress
import socket
from dataclasses import replace

import pytest

from rootcellar.config import EngineConfig
from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.media import MediaLimits
from rootcellar.media.fetching import _is_public, fetch, fetch_now

LIMITS = replace(MediaLimits.of(EngineConfig()), media_timeout=0.3, max_image_bytes=100_000)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
LONG = 1_000_000


def redirect(where: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode()


async def ask(path: str, answers: dict[str, bytes], *, host: str = "127.0.0.1", domains=("127.0.0.1:{port}",)) -> bytes:
    """Fetch ``path`` from a server on this machine which gives ``answers``; ``...`` in one: it says no more."""
    asked = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
        asked.append(line)
        content = answers[line].replace(b"{port}", str(port).encode())
        with contextlib.suppress(OSError):
            writer.write(content.removesuffix(b"..."))
            await writer.drain()
            if content.endswith(b"..."):
                await asyncio.sleep(2)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        limits = replace(LIMITS, allowed_media_domains=tuple(each.format(port=port) for each in domains))
        return await fetch(f"http://{host}:{port}{path}", limits)
    finally:
        server.close()


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.0 200 OK\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
        redirect("/there"),
        redirect("http://127.0.0.1:{port}/there"),
    ],
)
def test_what_a_host_that_is_named_has(answer):
    assert asyncio.run(ask("/a?b=c", {"/a?b=c": answer, "/there": OK})) == b"hello"


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", RequestError, "404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", RequestError, "ended before"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n...", RequestTooLarge, "max_image_bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * LONG + b"...", RequestTooLarge, "max_image_bytes"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * LONG, RequestError, "head|does not answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello...", RequestError, "media_timeout"),
        (b"...", RequestError, "media_timeout"),
        (b"", RequestError, "nothing"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", RequestError, "does not answer"),
        (redirect("/"), RequestError, "leads on"),
        (redirect("http://example.com/a.png"), RequestError, "allowed_media_domains"),
        (redirect("http://127.0.0.1:1/a.png"), RequestError, "allowed_media_domains"),
        (redirect("file:///etc/passwd"), RequestError, "must be as"),
        (redirect(""), RequestError, "leads on"),
    ],
    ids=range(14),
)
def test_what_a_host_can_do_to_who_asks_it(answer, kind, says):
    with pytest.raises(kind, match=says):
        asyncio.run(ask("/", {"/": answer}))


def test_a_name_may_not_stand_for_this_machine_unless_its_address_is_named():
    with pytest.raises(RequestError, match="private"):
        asyncio.run(ask("/", {"/": OK}, host="localhost", domains=("localhost:{port}",)))
    assert asyncio.run(ask("/", {"/": OK}, host="localhost", domains=("localhost:{port}", "127.0.0.1"))) == b"hello"


def test_a_name_is_resolved_once_and_all_that_it_stands_for_is_looked_at(monkeypatch):
    answers = [["127.0.0.1", "10.0.0.1"], ["127.0.0.1"]]
    asked = []

    async def resolve(self, host, port, **options):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in answers.pop(0)]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    domains = ("images.test:{port}", "127.0.0.1")
    with pytest.raises(RequestError, match="private"):
        asyncio.run(ask("/", {"/": OK}, host="images.test", domains=domains))
    assert asyncio.run(ask("/", {"/": OK}, host="images.test", domains=domains)) == b"hello"
    assert asked == ["images.test"] * 2


@pytest.mark.parametrize(
    ("domains", "host", "may"),
    [
        ((), "example.com", False),
        (("example.com",), "example.com", True),
        (("Example.com.",), "EXAMPLE.com.", True),
        (("example.com",), "a.example.com", False),
        (("*.example.com",), "a.example.com", True),
        (("*.example.com",), "example.com", False),
        (("*.example.com",), "badexample.com", False),
        (("example.com",), "example.com:8080", False),
        (("example.com:8080",), "example.com:8080", True),
        (("example.com:8080",), "example.com", False),
        (("example.com",), "example.com@evil.test", False),
        (("example.com",), "evil.test#@example.com", False),
        (("example.com",), "evil.test\\@example.com", False),
        (("example.com",), "example.com%2eevil.test", False),
        (("*",), "", False),
    ],
)
def test_which_hosts_are_meant(domains, host, may, monkeypatch):
    async def nowhere(*_, **__):
        raise OSError

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", nowhere)
    with pytest.raises(RequestError) as refused:
        fetch_now(f"http://{host}/a.png", replace(LIMITS, allowed_media_domains=domains))
    assert ("no host called" in str(refused.value)) is may


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
        "2002:a9fe:a9fe::", "2001:0:7f00:1::",
    ],
)  # fmt: skip
def test_addresses_that_are_not_the_worlds(address):
    assert not _is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_of_the_world(address):
    assert _is_public(ipaddress.ip_address(address))
