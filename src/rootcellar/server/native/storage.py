"""The store behind host memory, attached, replaced and taken away while requests run; SGLang's names."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.server.answer import on_thread
from rootcellar.server.errors import ApiError, invalid, json_response
from rootcellar.server.parsing import Body
from rootcellar.server.routes import AdminRoute
from rootcellar.server.state import state_of
from rootcellar.tiers.settings import read_extra
from rootcellar.tiers.stores.registry import runs_code

router = APIRouter(route_class=AdminRoute, tags=["Control"])
"""For whoever has the admin key."""


class StorageRequest(Body):
    """Which store, and how long requests wait for it."""

    hicache_storage_backend: str
    hicache_storage_backend_extra_config_json: str | dict[str, Any] | None = None
    hicache_storage_prefetch_policy: Literal["best_effort", "wait_complete", "timeout"] | None = None
    hicache_write_policy: Literal["write_through", "write_through_selective", "write_back"] | None = None


@router.get("/hicache/storage-backend")
async def storage_backend(request: Request) -> Response:
    """What is attached, by the names of the settings; null where nothing is."""
    return json_response(await on_thread(state_of(request).engine.storage.status))


@router.put("/hicache/storage-backend")
async def attach_storage_backend(request: Request, body: StorageRequest) -> Response:
    """Attach a store, in place of the one that there is; requests go on meanwhile."""
    engine = state_of(request).engine
    now = engine.config.hicache_write_policy
    if body.hicache_write_policy not in (None, now):
        raise invalid(
            f"the write policy is {now} as long as the server runs: start it with hicache_write_policy="
            f"{body.hicache_write_policy}",
            "hicache_write_policy",
        )
    extra = await on_thread(read_extra, body.hicache_storage_backend_extra_config_json)
    if runs_code(body.hicache_storage_backend, extra):
        raise invalid(
            f"hicache_storage_backend={body.hicache_storage_backend!r} runs code that its settings name: choose it "
            "when the server is started",
            "hicache_storage_backend",
        )
    status = await on_thread(
        engine.attach_storage,
        body.hicache_storage_backend,
        extra,
        prefetch_policy=body.hicache_storage_prefetch_policy,
        replace=True,
    )
    return json_response({"success": True, "message": "Store attached.", **status})


@router.delete("/hicache/storage-backend")
async def detach_storage_backend(request: Request) -> Response:
    """Stop using the store. Its pages stay in it, and those on the host there."""
    was = await on_thread(state_of(request).engine.detach_storage)
    return json_response({"success": True, "message": "Store detached." if was else "There was no store."})


@router.post("/hicache/storage-backend/clear")
async def clear_storage_backend(request: Request) -> Response:
    """Delete every page that the store holds, also those that other engines keep there."""
    pages = await on_thread(state_of(request).engine.storage.clear)
    if pages is None:
        raise ApiError(400, "no store is attached", code="no_storage")
    return json_response({"success": True, "message": "Store cleared.", "pages": pages})
