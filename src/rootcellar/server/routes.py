"""The kinds of routes: each says who may call it, and refuses others before it reads anything of theirs.

A router names its kind (``APIRouter(route_class=UserRoute)``), so the right belongs to the route that matched, however
its path was spelled. What has no kind is refused.
"""

from __future__ import annotations

import difflib
from typing import ClassVar

from fastapi import Depends, Request
from starlette.types import Receive, Scope, Send

from rootcellar.server.browsers import foreign
from rootcellar.server.callers import Access, noted_caller
from rootcellar.server.errors import ApiError
from rootcellar.server.parsing import OrjsonRoute

_CHECKED = "rootcellar.checked"
# Characters of a wrong path that are looked at and told.
_QUOTED = 100
_LINK = "rootcellar.link"


class _Checked(OrjsonRoute):
    """A route with a right."""

    access: ClassVar[Access]

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        check(scope, self.access)
        await super().handle(scope, receive, send)


class PublicRoute(_Checked):
    """For everybody: it holds and changes nothing."""

    access = Access.PUBLIC


class UserRoute(_Checked):
    """For whoever has an API key, where the server has some."""

    access = Access.USER


class OwnerRoute(_Checked):
    """For whoever has an API key with a name, and sees or changes its own; the admin key reaches all.

    Where users share one key, or need none, it is the admin's: what is theirs is everybody's.
    """

    access = Access.OWNER


class AdminRoute(_Checked):
    """For whoever has the admin key: it shows or changes what belongs to others."""

    access = Access.ADMIN


def note_link(scope: Scope) -> None:
    """Say that a link on a page from elsewhere led here; the gate does. Such links lead to no admin's route."""
    scope[_LINK] = True


def check(scope: Scope, access: Access) -> None:
    """Raise the ``ApiError`` for a caller who may not call a route of this access."""
    refusal = scope["app"].state.server.callers.refusal(noted_caller(scope), access)
    if refusal is not None:
        raise refusal
    if access >= Access.OWNER and _LINK in scope:
        raise foreign("links on pages from elsewhere")
    scope[_CHECKED] = access


async def _must_be_checked(request: Request) -> None:
    if _CHECKED not in request.scope:
        raise ApiError(
            403, "this route does not say who may call it: give its router a route_class of server/routes.py"
        )


must_be_checked = Depends(_must_be_checked)
"""A dependency of the whole app: what no kind of route has let through is refused."""


async def unmatched(scope: Scope, _receive: Receive, _send: Send) -> None:
    """What no route matches: 404 for users, with what they may have meant; for others the same as every other path."""
    check(scope, Access.USER)
    path = scope["path"]
    found = difflib.get_close_matches(path[:_QUOTED], scope["app"].state.paths, n=1)
    meant = f"did you mean {found[0]}?" if found else "GET /docs lists what there is"
    raise ApiError(404, f"there is no route {path[:_QUOTED]}: {meant}", code="no_such_route")
