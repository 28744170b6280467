"""What is served, with which settings, and how loaded it is."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import rootcellar
from rootcellar.server.answer import on_thread
from rootcellar.server.callers import own_of
from rootcellar.server.errors import json_response
from rootcellar.server.routes import UserRoute
from rootcellar.server.state import ServerState, state_of
from rootcellar.tiers.settings import shown_extra

router = APIRouter(route_class=UserRoute, tags=["SGLang"])


@router.get("/model_info")
@router.get("/get_model_info", include_in_schema=False)
async def model_info(request: Request) -> Response:
    """The model, its limits and the version of its weights."""
    state = state_of(request)
    config, status = state.engine.config, await on_thread(state.engine.status)
    content = {
        "model_path": config.model_path,
        "tokenizer_path": config.model_path,
        "served_model_name": state.model_name,
        "is_generation": True,
        "has_image_understanding": state.engine.image_token is not None,
        "weight_version": status["weight_version"],
        "vocab_size": state.engine.vocab_size,
        "max_prompt_length": state.longest_prompt,
    }
    return json_response(content)


@router.get("/server_info")
@router.get("/get_server_info", include_in_schema=False)
async def server_info(request: Request) -> Response:
    """Every setting (keys left out), what the engine holds, and how its memory was sized."""
    state = state_of(request)
    server = dataclasses.asdict(state.config)
    for name in ("api_key", "api_key_file", "admin_api_key"):
        del server[name]
    callers = state.callers
    required = {"api_key": not callers.open, "admin_api_key": callers.admin is not None}
    config = dataclasses.asdict(state.engine.config)
    config["hicache_storage_backend_extra_config"] = shown_extra(config["hicache_storage_backend_extra_config"])
    content = {
        **config,
        **server,
        "keys_required": required,
        "version": rootcellar.__version__,
        "programs_left": state.engine.programs.left,
        "max_total_num_tokens": state.engine.total_tokens,
        "internal_states": [await on_thread(state.engine.sight.stats, own_of(request))],
        "memory_report": state.engine.memory_report(),
    }
    return json_response(content)


@router.get("/v1/loads")
@router.get("/loads", include_in_schema=False)
async def loads(request: Request) -> Response:
    """How busy the engine is, in SGLang's form: what a router balances by.

    Used is what running requests and pins hold. What is only cached gives way to whoever needs the room: a router that
    took it for used would turn away from a server because it has much to hit.
    """
    load = await _load(state_of(request))
    running, waiting, usage = load["num_running_reqs"], load["num_waiting_reqs"], load["token_usage"]
    content = {
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(),
        "version": rootcellar.__version__,
        "dp_rank_count": 1,
        "loads": [load],
        "aggregate": {
            "total_running_reqs": running,
            "total_waiting_reqs": waiting,
            "total_reqs": running + waiting,
            "avg_token_usage": usage,
            "avg_utilization": load["utilization"],
        },
    }
    return json_response(content)


@router.get("/get_load", include_in_schema=False)
async def get_load(request: Request) -> Response:
    """The same in SGLang's older form, which its older routers read: a list with one entry for each replica."""
    load = await _load(state_of(request))
    content = {
        "dp_rank": 0,
        "num_reqs": load["num_total_reqs"],
        "num_waiting_reqs": load["num_waiting_reqs"],
        "num_tokens": load["num_used_tokens"],
    }
    return json_response([content])


async def _load(state: ServerState) -> dict[str, Any]:
    stats = await asyncio.wrap_future(state.engine.sight.asked_stats())
    usage = stats["occupancy"]["DEVICE"]["busy"]
    return {
        "dp_rank": 0,
        "num_running_reqs": stats["running"],
        "num_waiting_reqs": stats["waiting"],
        "num_total_reqs": stats["running"] + stats["waiting"],
        "num_used_tokens": round(usage * state.engine.total_tokens),
        "max_total_num_tokens": state.engine.total_tokens,
        "token_usage": usage,
        "cache_hit_rate": stats["hit_rate"],
        "utilization": stats["running"] / state.engine.max_running_requests,
        "max_running_requests": state.engine.max_running_requests,
    }
