"""Whose a request is and what it is called: tenants, the cache's namespaces, the names of requests.

A *tenant* is whoever a request is made for. What it caches, what its requests are called and what it pins are its own.
A *namespace* is where the cache keeps what may be shared; it is made here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import parse_qsl, quote

from rootcellar.config import EngineConfig
from rootcellar.errors import RequestError

LONGEST_NAME = 256
"""Characters of a name that a caller gives; it comes back in every answer, and is shown wherever its request is."""


def check_name(field: str, value: object) -> str:
    """``value`` as a name; ``RequestError`` when it is none, or one that no line of a log should hold."""
    if not isinstance(value, str):
        raise RequestError(f"{field} must be a string, not {type(value).__name__}")
    if len(value) > LONGEST_NAME:
        raise RequestError(f"{field} has {len(value)} characters: at most {LONGEST_NAME} are allowed")
    if not value.isprintable():
        raise RequestError(f"{field} has a character in it that cannot be printed")
    return value


def namespace(tenant: str, salt: str, extra_key: str) -> str:
    """The namespace of these three fields; empty when all are.

    No two different inputs give one: fields are named, and what stands in a field cannot end it. There is no slash in
    it, so the weights' version in front of it (``"{version}/{namespace}"``) is as well apart.
    """
    fields = {"tenant": tenant, "cache_salt": salt, "extra_key": extra_key}
    return "&".join(f"{name}={quote(value, '', errors='surrogatepass')}" for name, value in fields.items() if value)


def read_namespace(config: EngineConfig, tenant: str, salt: str, extra_key: str) -> str:
    """The namespace of what a caller gave, each checked as a name; tenants share one where the settings say so."""
    fields = {"tenant": tenant, "cache_salt": salt, "extra_key": extra_key}
    for field, value in fields.items():
        check_name(field, value)
    return namespace("" if config.share_cache_across_keys else tenant, salt, extra_key)


def tenant_in(key_namespace: str) -> str:
    """The tenant of a namespace as cache keys have it, with the weights' version in front."""
    fields = dict(parse_qsl(key_namespace.rpartition("/")[2], errors="surrogatepass"))
    return fields.get("tenant", "")


def names_of(rid: str | Sequence[str] | None, prompts: int) -> list[tuple[str, ...]]:
    """For each prompt of a call the names that its answers go by, the widest first; none when it was given none.

    A list names each prompt. One name is that of the call: its only prompt has it too, several are ``rid-0`` and so on.

    Raises:
        RequestError: there are not as many names as prompts, or one is no name.
    """
    if rid is None:
        return [()] * prompts
    if isinstance(rid, str):
        check_name("rid", rid)
        return [(rid,)] if prompts == 1 else [(rid, f"{rid}-{i}") for i in range(prompts)]
    if not isinstance(rid, Sequence) or len(rid) != prompts:
        raise RequestError(f"rid must be one str or a list of {prompts}, one for each prompt")
    return [(check_name("rid", name),) for name in rid]
