"""A decode node that sends each prompt to its prefill node by itself (``--prefill-url``): two servers and no router.

What is sent is a ``POST /generate`` with token ids, whatever route a client used here: the prefill node need not know
how the answer is to be. Its own says nothing but that it has given the prompt's KV cache away, or why it has not.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit
from uuid import uuid4

import httptools
import orjson
from fastapi import Request

from rootcellar.engine import Engine
from rootcellar.engine.room_fields import ROOMS
from rootcellar.errors import ConfigError, EngineError, RequestError

_MOST_ANSWERS = 2**8
"""To one prompt; more are refused elsewhere."""
_PASSED_ON = ("authorization", "x-api-key")
_MOST = 1 << 20
_PIECE = 1 << 16
_CONNECT = 10.0
"""Seconds."""


@dataclass(frozen=True)
class PrefillNode:
    """The server that computes prompts for this one."""

    url: SplitResult
    engine: Engine

    @classmethod
    def at(cls, url: str, engine: Engine) -> PrefillNode:
        """That of this address. ``ConfigError``: it is none, or the engine is no decode node."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ConfigError(f"prefill_url={url!r} is not allowed: the address of a server, as http://10.0.0.1:30000")
        if engine.config.disaggregation_mode != "decode":
            raise ConfigError("prefill_url is for a decode node: it needs disaggregation_mode='decode'")
        return cls(parts, engine)

    @contextlib.asynccontextmanager
    async def asked(self, request: Request, arguments: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """``arguments`` of ``Engine.generate`` whose prompts the other node computes until this is left.

        Whoever says where its prompt is computed is left alone.
        """
        if arguments.get("bootstrap_room") is not None or "input_ids" not in arguments:
            yield arguments
            return
        if "image_data" in arguments:
            raise RequestError(
                "images and prefill_url: send prompts with images to a router, or to a node of their own"
            )
        # One name on both nodes: so that what each did of a request can be put together (``rootcellar trace``).
        arguments = {**arguments, "rid": arguments.get("rid") or uuid4().hex}
        rooms = _rooms(arguments)
        where = {
            "bootstrap_host": self.url.hostname,
            "bootstrap_port": self.engine.config.disaggregation_bootstrap_port,
            "bootstrap_room": rooms,
        }
        body = {**_of_prompts(arguments), **where}
        headers = {name: value for name in _PASSED_ON if (value := request.headers.get(name)) is not None}
        sending = asyncio.create_task(self._send(body, headers, rooms))
        try:
            yield {**arguments, **where}
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending

    async def _send(self, body: Mapping[str, Any], headers: Mapping[str, str], rooms: list[int]) -> None:
        """Send it, and tell those who wait for it when it comes to nothing."""
        try:
            status, said = await self._post("/generate", orjson.dumps(body), headers)
            why = None if status == 200 else f"the prefill node at {self.url.netloc} says {status}: {_message(said)}"
        except (OSError, TimeoutError, EOFError, ValueError) as error:
            why = f"the prefill node at {self.url.netloc} does not answer: {error or type(error).__name__}"
        if why is not None:
            with contextlib.suppress(EngineError):  # it was shut down: nobody waits
                await asyncio.wrap_future(self.engine.rooms.lost(rooms, why))

    async def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """The status and the body of an answer. Raises ``OSError`` or ``ValueError``: there is none."""
        url = self.url
        tls = ssl.create_default_context() if url.scheme == "https" else None
        port = url.port or (443 if tls else 80)
        opening = asyncio.open_connection(url.hostname, port, ssl=tls)
        reader, writer = await asyncio.wait_for(opening, _CONNECT)
        try:
            lines = [f"POST {url.path.rstrip('/')}{path} HTTP/1.1", f"Host: {url.netloc}", "Connection: close"]
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
            await writer.drain()
            answer = _Answer()
            parser = httptools.HttpResponseParser(answer)
            while not answer.over and (some := await reader.read(_PIECE)):
                parser.feed_data(some)
            if not answer.begun:
                raise ConnectionError("it ended the connection")
            return parser.get_status_code(), bytes(answer.body)
        except httptools.HttpParserError as error:
            raise ConnectionError(f"what it says is no HTTP: {error}") from None
        finally:
            writer.close()


class _Answer:
    """What comes of one, by httptools' callbacks; of a body, the beginning."""

    def __init__(self) -> None:
        self.begun = self.over = False
        self.body = bytearray()

    def on_headers_complete(self) -> None:
        self.begun = True

    def on_body(self, some: bytes) -> None:
        self.body += some[: _MOST - len(self.body)]

    def on_message_complete(self) -> None:
        self.over = True


def _of_prompts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The body for the prompts of a call: what says whose they are, and how many answers each will have."""
    params = arguments.get("sampling_params")
    counts = [{"max_new_tokens": 0, "n": n} for n in _answers(params if isinstance(params, list) else [params])]
    body = {"input_ids": arguments["input_ids"], "sampling_params": counts if isinstance(params, list) else counts[0]}
    kept = ("rid", "priority", "extra_key", "cache_salt")
    return body | {name: arguments[name] for name in kept if arguments.get(name)}


def _answers(params: Sequence[Mapping[str, Any] | None]) -> list[int]:
    """How many answers each of these sampling parameters asks for; one where what it says is refused in any case."""
    counts = [(one or {}).get("n") or 1 for one in params]
    return [n if isinstance(n, int) and 0 < n <= _MOST_ANSWERS else 1 for n in counts]


def _rooms(arguments: Mapping[str, Any]) -> list[int]:
    """A room for each answer of a call: those of one prompt are next to each other."""
    ids, params = arguments["input_ids"], arguments.get("sampling_params")
    prompts = len(ids) if ids and isinstance(ids[0], list) else 1
    rooms: list[int] = []
    for n in _answers(params if isinstance(params, list) else [params] * prompts):
        first = secrets.randbelow(ROOMS // _MOST_ANSWERS) * _MOST_ANSWERS
        rooms += range(first, first + n)
    return rooms


def _message(said: bytes) -> str:
    try:
        return str(orjson.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return said[:200].decode(errors="replace")
