"""Who calls: from the API key that a request brings to its caller, and what that caller may do.

API keys are the only identity. The admin's may do everything; each user's is a *tenant*, whose cache, request ids and
pins are its own. Without users' keys everybody is the one anonymous user.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from fastapi import Request
from starlette.types import Scope

from rootcellar.errors import ConfigError
from rootcellar.server.errors import ApiError
from rootcellar.server_config import ServerConfig

_CALLER = "rootcellar.caller"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Access(IntEnum):
    """Who may call a route."""

    PUBLIC = 0
    USER = 1
    OWNER = 2  # whoever has a name: what is shown is its own
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request. ``name``: the tenant; empty for the only user and for the admin."""

    name: str = ""
    admin: bool = False

    def reaches(self, access: Access) -> bool:
        """Whether it may call a route of this access."""
        return self.admin or access <= (Access.OWNER if self.name else Access.USER)


@dataclass(frozen=True, slots=True)
class Callers:
    """The API keys of one server: who has which. ``users``: (API key, tenant) of each user."""

    users: tuple[tuple[bytes, str], ...]
    admin: bytes | None

    @classmethod
    def of(cls, config: ServerConfig) -> Callers:
        """The callers that the settings name. ``ConfigError``: a key cannot be read, or two callers share one."""
        given = [*config.api_key, *_lines(config.api_key_file)]
        # Only one key and no name: there is nobody to tell its owner from.
        pairs = [_named(word, f"key-{i + 1}" if len(given) > 1 else "") for i, word in enumerate(given)]
        api_keys = [api_key for api_key, _ in pairs] + ([] if config.admin_api_key is None else [config.admin_api_key])
        if len(set(api_keys)) < len(api_keys):
            raise ConfigError(
                "two of the keys are equal (api_key, api_key_file, admin_api_key): give each caller its own"
            )
        admin = None if config.admin_api_key is None else config.admin_api_key.encode()
        return cls(tuple((api_key.encode(), name) for api_key, name in pairs), admin)

    @property
    def open(self) -> bool:
        """Whether users need no API key."""
        return not self.users

    @property
    def tenants(self) -> tuple[str, ...]:
        """The names of those whose caches, request ids and pins are kept apart; with one of them nobody is."""
        return tuple(dict.fromkeys(name for _, name in self.users))

    def of_token(self, token: bytes) -> Caller | None:
        """Who has this API key; None: nobody, and users need one."""
        if self.admin is not None and hmac.compare_digest(token, self.admin):
            return Caller(admin=True)
        found = [
            name for api_key, name in self.users if hmac.compare_digest(token, api_key)
        ]  # all of them, for one time
        if found:
            # One key for everything is an admin's too; of several none may look at the others.
            return Caller(found[0], admin=self.admin is None and len(self.tenants) == 1)
        return Caller(admin=self.admin is None) if self.open else None

    def refusal(self, caller: Caller | None, access: Access) -> ApiError | None:
        """The answer to a caller who may not call a route of this access; None: may."""
        if access is Access.PUBLIC or (caller is not None and caller.reaches(access)):
            return None
        if access is Access.USER:
            return unauthorized("this server needs its api_key, as 'Authorization: Bearer KEY'")
        if self.admin is None and len(self.tenants) > 1:
            return unauthorized(
                "this is for an administrator, and of several keys (api_key) none is one: start the server with "
                "an admin_api_key"
            )
        name = "api_key" if self.admin is None else "admin_api_key"
        return unauthorized(f"this needs the server's {name}, as 'Authorization: Bearer KEY'")


def note_caller(scope: Scope, caller: Caller | None) -> None:
    """Say who sent the request; the gate does."""
    scope[_CALLER] = caller


def noted_caller(scope: Scope) -> Caller | None:
    """Who sent the request; None: somebody without the API key that users need."""
    caller: Caller | None = scope[_CALLER]
    return caller


def paying(scope: Scope | None) -> str:
    """Who pays for the time that a request takes, by name; ``scope`` None: nobody knows yet whose it is."""
    caller: Caller | None = None if scope is None else scope.get(_CALLER)
    # Whoever has no key, or the admin's, is one more tenant here: a name in parentheses is nobody's.
    return "(nobody)" if caller is None else "(admin)" if caller.admin else caller.name


def caller_of(request: Request) -> Caller:
    """Who sent the request, for routes that only users reach."""
    caller = noted_caller(request.scope)
    if caller is None:
        raise unauthorized("this server needs its api_key, as 'Authorization: Bearer KEY'")
    return caller


def require_owner(scope: Scope, callers: Callers) -> None:
    """Raise ``ApiError`` for whoever may not call routes for owners: for fields that do what those do."""
    refusal = callers.refusal(noted_caller(scope), Access.OWNER)
    if refusal is not None:
        raise refusal


def own_of(request: Request) -> str | None:
    """The tenant whose own things a caller is shown; None: everybody's, for the admin, and for users without a name.

    Routes that must not show everybody's to the latter are for owners.
    """
    caller = caller_of(request)
    return None if caller.admin or not caller.name else caller.name


def unauthorized(message: str) -> ApiError:
    """The answer to a missing or wrong API key."""
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file={path!r} cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    words = [line for line in lines if line and not line.startswith("#")]
    if not words:
        raise ConfigError(f"api_key_file={path!r} names no key: write one 'name:key' a line")
    return words


def _named(word: str, otherwise: str) -> tuple[str, str]:
    """(API key, name) of ``name:key`` or a key alone. With a colon in it it is written with a name, or ``:key``."""
    head, colon, tail = word.partition(":")
    api_key, name = (tail, head or otherwise) if colon else (word, otherwise)
    if not api_key or not api_key.isprintable() or api_key != api_key.strip():
        raise ConfigError("a key of api_key or api_key_file is empty, or has spaces around it: write KEY or name:KEY")
    if name and not _NAME.fullmatch(name):
        raise ConfigError(f"the name {name!r} of a key is not allowed: up to 64 letters, digits, '.', '_' and '-'")
    return api_key, name
