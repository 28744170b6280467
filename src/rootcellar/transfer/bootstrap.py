"""Where a decode node finds a prefill node: a small HTTP service on ``disaggregation_bootstrap_port``.

Its routes are SGLang's: a prefill node registers by ``PUT /route``, a decode node reads ``GET /route``; ``POST
/register_dp_rank`` and ``POST /query_dp_ranks`` say which replica has a room, and there is one; ``GET /health``. The
node that runs it registers by itself; from outside that takes a token, since decode nodes are sent to who registers.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hmac import compare_digest
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from rootcellar.transfer.terms import Terms
from rootcellar.transfer.wires.tcp import WireError, accept, end_listening

_MOST = 1 << 20
_READ_ON = 16 << 20
"""Bytes of a refused body that are read, at most."""
_ROUTES = "there are /route, /register_dp_rank, /query_dp_ranks and /health"
_ROOMS = 1 << 16
"""Rooms whose rank is remembered, the newest."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a prefill node gives its pages, and what it is. ``node``: other at each start.

    ``lends``: the address of its wire, where that is another than the connection.
    """

    host: str
    port: int
    node: str
    terms: Terms
    lends: str = ""

    def plain(self) -> dict[str, Any]:
        """As values of JSON, by SGLang's names where it has one."""
        return {
            "rank_ip": self.host,
            "rank_port": self.port,
            "attn_tp_size": 1,
            "attn_cp_size": 1,
            "dp_size": 1,
            "pp_size": 1,
            "page_size": self.terms.page_size,
            "kv_cache_dtype": self.terms.kv_cache_dtype,
            "follow_bootstrap_room": True,
            "node": self.node,
            "terms": self.terms.plain(),
            "lends": self.lends,
        }

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Route:
        """The inverse of :meth:`plain`. Raises ``WireError`` for what no rootcellar says."""
        try:
            host, port, node, terms = said["rank_ip"], int(said["rank_port"]), said["node"], said["terms"]
        except (KeyError, TypeError, ValueError):
            known = {name: said.get(name) for name in ("page_size", "kv_cache_dtype") if name in said}
            raise WireError(f"what registered there is no prefill node of rootcellar: it says {known}") from None
        return cls(str(host), port, str(node), Terms.read(terms), str(said.get("lends", "")))


class Bootstrap:
    """The service of one prefill node, on threads of its own."""

    def __init__(self, host: str, port: int, token: str | None = None) -> None:
        """Listen. ``token``: whoever brings it may register; None: nobody from outside. Raises ``OSError``."""
        self._token = token
        self._lock = threading.Lock()
        self._route: dict[str, Any] | None = None
        self._ranks: dict[str, int] = {}

        service = self

        class Handler(_Handler):
            bootstrap = service

        self._server = _Server((host, port), Handler)
        self._thread = threading.Thread(target=self._serve, name="rootcellar-bootstrap", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def admits(self, authorization: str) -> bool:
        """Whether a request with this header may register."""
        return self._token is not None and compare_digest(authorization.encode(), f"Bearer {self._token}".encode())

    def register(self, said: Mapping[str, Any]) -> None:
        """From now on decode nodes are sent there."""
        with self._lock:
            self._route = dict(said)

    def route(self) -> dict[str, Any] | None:
        """Where decode nodes are sent; None: nobody has registered."""
        with self._lock:
            return self._route

    def note_ranks(self, said: Mapping[str, Any]) -> None:
        """A router says which replica has a room."""
        with self._lock:
            self._ranks[str(said["bootstrap_room"])] = int(said["dp_rank"])
            while len(self._ranks) > _ROOMS:
                del self._ranks[next(iter(self._ranks))]

    def ranks(self, said: Mapping[str, Any]) -> dict[str, int]:
        """Which replicas have these rooms, as far as that was said."""
        with self._lock:
            return {str(room): self._ranks[str(room)] for room in said["bootstrap_rooms"] if str(room) in self._ranks}

    def close(self) -> None:
        """Listen no more."""
        end_listening(self._server.socket)
        self._thread.join()

    def _serve(self) -> None:
        while (request := accept(self._server.socket, _Handler.timeout)) is not None:
            self._server.process_request(request, None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.getaddrinfo(address[0], address[1], type=socket.SOCK_STREAM)[0][0]
        super().__init__(address, handler)


class _Handler(BaseHTTPRequestHandler):
    bootstrap: Bootstrap
    protocol_version = "HTTP/1.1"
    timeout = 10.0

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/health":
            self._answer(200, "OK")
        elif path != "/route":
            self._answer(404, _ROUTES)
        elif (route := self.bootstrap.route()) is None:
            self._answer(404, "no prefill node has registered")
        else:
            self._answer(200, route)

    def do_PUT(self) -> None:
        self._take({"/route": self.bootstrap.register})

    def do_POST(self) -> None:
        self._take({"/register_dp_rank": self.bootstrap.note_ranks, "/query_dp_ranks": self.bootstrap.ranks})

    def _take(self, routes: Mapping[str, Any]) -> None:
        path = urlsplit(self.path).path
        done = routes.get(path)
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MOST:
            self.close_connection = True
            self._answer(411, "say the length of the body, a megabyte at most")
            # A client that is still sending would find the connection broken, and no answer.
            left = min(int(length), _READ_ON) if length.isdecimal() else 0
            while left > 0 and (some := self.rfile.read(min(left, _MOST))):
                left -= len(some)
            return
        body = self.rfile.read(int(length))
        if done is None:
            self._answer(404, _ROUTES)
            return
        if path != "/query_dp_ranks" and not self.bootstrap.admits(self.headers.get("Authorization", "")):
            self._answer(401, "registering takes the token of this service")
            return
        try:
            said = json.loads(body)
            result = done(said)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._answer(400, f"the body is not what belongs here: {error!r}")
        else:
            self._answer(200, "OK" if result is None else result)

    def _answer(self, status: int, content: object) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who asks is no news."""


def find(host: str, port: int, deadline: float) -> Route:
    """The prefill node behind a bootstrap service. Raises ``OSError``: nobody answers, or no prefill node is there.

    One that listens on all addresses is where its service is.
    """
    connection = HTTPConnection(host, port, timeout=deadline)
    try:
        connection.request("GET", "/route?engine_rank=0&target_dp_group=0&target_pp_rank=0")
        response = connection.getresponse()
        body = response.read(_MOST)
        if response.status != 200:
            raise WireError(f"the bootstrap service says {response.status}: {body[:200].decode(errors='replace')}")
        said = json.loads(body)
    except (HTTPException, ValueError) as error:
        raise WireError(f"what answers there is no bootstrap service: {error!r}") from None
    finally:
        connection.close()
    if not isinstance(said, dict):
        raise WireError("what answers there is no bootstrap service")
    route = Route.read(said)
    return replace(route, host=host) if route.host in ("", "0.0.0.0", "::") else route
