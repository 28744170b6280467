"""Which web pages may speak to the server: hosts, origins, and what a browser says of where a request comes from.

A page of somebody else's can make a browser send requests to every address that the browser reaches, this machine's own
among them; keys do not help where there are none. So a foreign ``Origin`` is refused. An image or a link sends none,
and the browser's ``Sec-Fetch-Site`` is looked at. And a foreign name that was made to point here (DNS rebinding) is
refused by its ``Host``, where only this machine should reach the server.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from rootcellar.errors import ConfigError
from rootcellar.server.errors import ApiError, invalid
from rootcellar.server_config import ServerConfig

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/@\s]+)(?::\d{1,5})?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")
_QUOTED = 100


@dataclass(frozen=True, slots=True)
class Browsers:
    """What a server lets web pages do.

    ``origins``: pages from elsewhere that may call it, ``"*"`` any; ``hosts``: names that it may be called by, beside
    those of this machine; None: by any name.
    """

    origins: frozenset[str]
    hosts: frozenset[str] | None

    @classmethod
    def of(cls, config: ServerConfig, *, open: bool) -> Browsers:
        """What the settings say; ``open``: users need no key. ``ConfigError``: an origin or a host is none."""
        for origin in config.cors_allow_origin:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_allow_origin={origin!r} is no origin: write scheme://host or scheme://host:port, in lower "
                    "case and with nothing after it, or '*'"
                )
        hosts = frozenset(host.lower() for host in config.allowed_hosts)
        for host in hosts:
            if host != "*" and host_name(host.removeprefix("*.")) != host.removeprefix("*."):
                raise ConfigError(f"allowed_hosts={host!r} is no host: write a name without a port, '*.name', or '*'")
        checked = bool(hosts) or (open and is_loopback(config.host))
        return cls(frozenset(config.cors_allow_origin), hosts if checked and "*" not in hosts else None)

    def refusal(self, headers: Headers) -> ApiError | None:
        """The answer to a request that a page from elsewhere sent, or that came for another host; None: neither."""
        named = headers.getlist("host")
        if len(named) > 1:
            return invalid("the request has more than one Host header")
        host = named[0] if named else ""
        # Without a name there is no browser, and nothing to rebind.
        if self.hosts is not None and named and not self._is_ours(host):
            return ApiError(
                403,
                f"the host {host[:_QUOTED]!r} is none of this server's: name it with --allowed-hosts, or call it by "
                "localhost or 127.0.0.1",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self._may_call(origin, host):
            return foreign(f"pages of {origin[:_QUOTED]!r}")
        return None

    def comes_from_elsewhere(self, headers: Headers) -> bool:
        """Whether a page from elsewhere made the browser send this, without saying which page it is."""
        return (
            "origin" not in headers
            and "*" not in self.origins
            and headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        )

    def _is_ours(self, host: str) -> bool:
        name = host_name(host)
        if name is None or self.hosts is None:
            return False
        return is_loopback(name) or any(
            name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:])) for allowed in self.hosts
        )

    def _may_call(self, origin: str, host: str) -> bool:
        # The server's own pages; behind a proxy that speaks TLS the scheme is not the one that the server sees.
        own = bool(host) and origin != "null" and urlsplit(origin).netloc.lower() == host.lower()
        return own or origin in self.origins or "*" in self.origins


def foreign(who: str) -> ApiError:
    """The answer to a page from elsewhere."""
    return ApiError(
        403, f"{who} may not call this server: name their origin with --cors-allow-origin", code="origin_not_allowed"
    )


def host_name(host: str) -> str | None:
    """The name of a Host header, without its port, in lower case; None when it is none."""
    found = _HOST.fullmatch(host)
    return found[1].lower().rstrip(".").strip("[]") if found else None


def is_loopback(host: str) -> bool:
    """Whether a name or an address can only be this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
