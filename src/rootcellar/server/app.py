"""The app: every route, behind the gate."""

from __future__ import annotations

import functools

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

import rootcellar
from rootcellar.engine import Engine
from rootcellar.server import described, errors
from rootcellar.server.anthropic import messages
from rootcellar.server.door import Door
from rootcellar.server.gate import Gate
from rootcellar.server.native import control, generate, health, info, prefixes, storage, weights
from rootcellar.server.openai import chat, completions, models, render
from rootcellar.server.responses import responses
from rootcellar.server.routes import must_be_checked, unmatched
from rootcellar.server.shared import Shared
from rootcellar.server.state import ServerState
from rootcellar.server_config import ServerConfig


def routers(state: ServerState) -> list[APIRouter]:
    """All routes; each router's ``route_class`` says who may call them."""
    return [
        completions.router,
        chat.router,
        render.router,
        models.router,
        messages.router,
        responses.router,
        generate.router,
        info.router,
        control.abort_router,
        control.router,
        weights.router,
        storage.router,
        prefixes.router,
        prefixes.check_router,
        health.router,
        described.router,
        state.observer.page,
        state.observer.numbers,
        state.observer.looks,
    ]


def create_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """The ASGI app over ``engine``; ``app.state.server`` is its :class:`ServerState`."""
    app = FastAPI(
        title="rootcellar",
        version=rootcellar.__version__,
        description="An LLM inference server whose heart is its KV cache; see docs/serving.md.",
        openapi_url=None,  # FastAPI's own routes would have no right: described.py has ours
        redirect_slashes=False,  # one spelling a route; and a redirect would say where by the Host header
        dependencies=[must_be_checked],
    )
    state = ServerState(engine, config)
    state.health = Shared(functools.partial(health.check, state), health.FRESH_SECONDS)
    app.state.server = state
    app.state.paths = []  # what there is, for whoever asks for something else
    errors.install(app)
    for router in routers(state):
        app.include_router(router)
        app.state.paths += [route.path for route in router.routes if isinstance(route, Route)]
    app.router.default = unmatched
    app.add_middleware(Gate, state=state)
    app.add_middleware(Door, max_body_bytes=config.max_body_bytes)
    if config.cors_allow_origin:  # outermost, so that pages may read errors too; preflights bring no key
        origins = config.cors_allow_origin
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return app
