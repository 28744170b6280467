"""What the cache holds of a prompt and why, keeping it there, and the proof that all is well."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from rootcellar.engine.identity import LONGEST_NAME
from rootcellar.server.answer import on_thread, whole
from rootcellar.server.callers import Caller, caller_of, own_of
from rootcellar.server.errors import ApiError, invalid, json_response
from rootcellar.server.native.protocol import InputIds
from rootcellar.server.openai.chat import for_template
from rootcellar.server.openai.protocol import Messages, Rendering
from rootcellar.server.prompts import checked_ids, read_chat, read_prompts
from rootcellar.server.routes import AdminRoute, OwnerRoute
from rootcellar.server.state import ServerState, state_of

router = APIRouter(route_class=OwnerRoute, tags=["Cache"])
"""For whoever owns what is cached."""
check_router = APIRouter(route_class=AdminRoute, tags=["Cache"])
Most = Annotated[int, Query(ge=1, le=100, description="At most so many.")]


class PromptRequest(Rendering):
    """One prompt: its text, its token ids, or the messages of a chat; and the namespace it is cached in."""

    text: str | None = None
    input_ids: InputIds | None = None
    messages: Messages | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    tenant: str | None = None

    async def tokens(self, state: ServerState) -> list[int]:
        """The token ids, checked."""
        if self.messages is None:
            prompts = await read_prompts(state, self.text, self.input_ids)
        elif self.text is not None or self.input_ids is not None:
            raise invalid("give one of text, input_ids and messages")
        else:
            messages, options = for_template(self.messages, self)
            prompts = await read_chat(state, messages, **options)
        if not prompts.one:
            raise invalid("give one prompt: a list of token ids", "input_ids")
        return checked_ids(state, prompts.input_ids)

    def where(self, caller: Caller) -> dict[str, str]:
        """Whose cache is meant: the caller's own, and for an admin that of the tenant who is named."""
        if self.tenant is not None and not caller.admin:
            raise invalid("tenant is for whoever has the admin key: leave it out", "tenant")
        tenant = caller.name if self.tenant is None else self.tenant
        return {"extra_key": self.extra_key or "", "cache_salt": self.cache_salt or "", "tenant": tenant}


class PinRequest(PromptRequest):
    """A prefix to keep for ``ttl`` seconds; 0 lets go of it."""

    ttl: Annotated[float, Field(ge=0, le=10**7, allow_inf_nan=False)] = 3600.0
    compute: bool = True


class HintRequest(PromptRequest):
    """What becomes of a prompt; ``hints`` as for ``Prefixes.hint``."""

    hints: dict[str, Any]


@router.post("/cache/hint")
async def hint(body: HintRequest, request: Request) -> Response:
    """Say how long to keep a prompt, when it comes next, or that it may go; each hint is answered."""
    state = state_of(request)
    ids = await body.tokens(state)
    caller = caller_of(request)
    where, share = body.where(caller), state.pinned_share(caller)
    replies = await on_thread(state.engine.prefixes.hint, ids, body.hints, **where, share=share)
    return json_response({"prompt_tokens": len(ids), "hints": replies})


@router.post("/cache/explain")
async def explain(body: PromptRequest, request: Request) -> Response:
    """Why this prompt hits as far as it does, in numbers and in words."""
    state = state_of(request)
    ids = await body.tokens(state)
    caller = caller_of(request)
    where = body.where(caller)
    return json_response(await on_thread(state.engine.prefixes.explain, ids, **where, others=caller.admin))


@router.get("/cache/explain/{rid}")
async def explain_request(rid: str, request: Request) -> Response:
    """Why a request that was answered lately, or is being answered, computed what it did; by its id."""
    state = state_of(request)
    found = await on_thread(state.engine.prefixes.explained, rid, own_of(request))
    if found is None:
        message = f"no request {rid[:LONGEST_NAME]!r} is remembered: it is from its first token on, for a while"
        raise ApiError(404, message, "rid", "no_such_request")
    return json_response(found)


@router.get("/cache/report")
async def report(request: Request, most: Most = 10) -> Response:
    """What the prompts of the last hour computed again: the costliest causes, with an example each."""
    return json_response(await on_thread(state_of(request).engine.prefixes.report, own_of(request), most))


@router.post("/cache/pin")
async def pin(body: PinRequest, request: Request) -> Response:
    """Keep a prefix: it is computed first where it is not cached (unless ``compute`` is false)."""
    state = state_of(request)
    ids = await body.tokens(state)
    caller = caller_of(request)
    where = body.where(caller)
    if body.ttl == 0:
        found = await on_thread(state.engine.prefixes.unpin, ids, **where)
        return json_response({"unpinned": found, "prompt_tokens": len(ids)})
    if body.compute:
        await whole(request, state, input_ids=ids, sampling_params={"max_new_tokens": 0}, **where)
    share = 1.0 if caller.admin else 1 / len(state.callers.tenants)
    return json_response(await on_thread(state.engine.prefixes.pin, ids, body.ttl, **where, share=share))


@check_router.post("/cache/check")
async def check(request: Request) -> Response:
    """Recount every invariant of the cache between two steps; 500 with the evidence when one does not hold."""
    await on_thread(state_of(request).engine.check)
    return json_response({"success": True, "message": "Every invariant holds."})
