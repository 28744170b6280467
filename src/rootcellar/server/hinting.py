"""What a request says of its own conversation in the cache: hints, answered beside its answer, and what to keep."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request

from rootcellar.engine.hints import Reply, check_hints
from rootcellar.errors import EngineError
from rootcellar.server.answer import Result, on_thread
from rootcellar.server.callers import caller_of, require_owner
from rootcellar.server.errors import invalid
from rootcellar.server.state import ServerState


def check(
    request: Request, state: ServerState, hints: dict[str, Any] | None, arguments: Mapping[str, Any], n: int
) -> None:
    """Refuse hints that are wrong, or of more than one conversation, before anything is computed.

    ``ApiError``, too: the caller owns nothing. Those without a name are many, and would let go of each other's pins.
    """
    if hints is None:
        return
    require_owner(request.scope, state.callers)
    check_hints(hints)
    ids = arguments["input_ids"]
    if n != 1 or (ids and isinstance(ids[0], Sequence)):
        raise invalid("cache_hints are for one conversation: one prompt and n=1", "cache_hints")


async def taken(
    request: Request, state: ServerState, hints: Mapping[str, Any], arguments: Mapping[str, Any], result: Result
) -> list[dict[str, Any]]:
    """The answers to ``hints`` on the prompt of ``arguments`` and its answer."""
    where = _where(request, state, arguments)
    ids = [*arguments["input_ids"], *result["output_ids"][:-1]]  # the newest token was not computed
    try:
        return await on_thread(state.engine.prefixes.hint, ids, hints, **where)
    except EngineError as error:  # it was shut down: an answer that is there is told all the same
        return [Reply(name, "refused", str(error)).fields() for name in hints]


async def keep(
    request: Request, state: ServerState, ids: Sequence[int], seconds: float, arguments: Mapping[str, Any]
) -> None:
    """Keep what is cached of these tokens of a conversation for so long, as far as there is room.

    A client that goes away meanwhile changes nothing, nor does an engine that was shut down: an answer that is there is
    told all the same.
    """
    if len(ids):
        with contextlib.suppress(EngineError):
            await on_thread(state.engine.prefixes.keep, ids, seconds, **_where(request, state, arguments))


def _where(request: Request, state: ServerState, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """On whose behalf something is said of the prompt of ``arguments``, and where that is cached."""
    caller = caller_of(request)
    fields = {name: arguments[name] for name in ("extra_key", "cache_salt")}
    return {"tenant": arguments.get("tenant", caller.name), **fields, "share": state.pinned_share(caller)}
