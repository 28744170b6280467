"""Explanations of requests beside their answers, for those who ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request

from rootcellar.server.answer import Result, on_thread
from rootcellar.server.callers import own_of, require_owner
from rootcellar.server.state import ServerState

HEADER = "x-cache-explain"
"""Asks for an explanation where a body cannot."""


def wants_explanation(request: Request, state: ServerState, given: bool | None) -> bool:
    """Whether an answer is to explain what it computed; ``given``: what its body says.

    ``ApiError``: the caller may not see what the server holds: an answer quotes earlier prompts of the same caller,
    and those without a name are many.
    """
    if not given and request.headers.get(HEADER, "") not in ("1", "true"):
        return False
    require_owner(request.scope, state.callers)
    return True


async def explanations(request: Request, state: ServerState, results: Sequence[Result]) -> list[dict[str, Any] | None]:
    """One for each result; None where it is not known any more."""
    tenant, names = own_of(request), [result["meta_info"]["id"] for result in results]
    return await on_thread(lambda: [state.engine.prefixes.explained(name, tenant) for name in names])
