"""The app: every route, behind the gate."""

from __future__ import annotations

import functools

from fastapi import APIRouter, FastAPI
from starlette.routing import Route

import rootcellar
from rootcellar.engine import Engine
from rootcellar.server import errors
from rootcellar.server.door import Door
from rootcellar.server.gate import Access, Gate
from rootcellar.server.native import control, generate, health, info, prefixes
from rootcellar.server.openai import chat, completions, models
from rootcellar.server.shared import Shared
from rootcellar.server.state import State
from rootcellar.server_config import ServerConfig


def routers(state: State) -> list[tuple[APIRouter, Access]]:
    """All routes, and who may call them."""
    return [
        (completions.router, Access.USER),
        (chat.router, Access.USER),
        (models.router, Access.USER),
        (generate.router, Access.USER),
        (info.router, Access.USER),
        (control.abort_router, Access.USER),
        (control.router, Access.ADMIN),
        (prefixes.router, Access.ADMIN),
        (health.router, Access.PUBLIC),
        (state.observer.page, Access.PUBLIC),
        (state.observer.numbers, Access.USER),
        (state.observer.looks, Access.ADMIN),
    ]


def create_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """The ASGI app over ``engine``; ``app.state.server`` is its :class:`State`."""
    app = FastAPI(
        title="rootcellar",
        version=rootcellar.__version__,
        description="An LLM inference server whose heart is its KV cache; see docs/serving.md.",
    )
    state = State(engine, config)
    state.health = Shared(functools.partial(health.check, state), health.FRESH_SECONDS)
    app.state.server = state
    errors.install(app)
    access: dict[str, Access] = {}
    for router, who in routers(state):
        app.include_router(router)
        access.update({route.path: who for route in router.routes if isinstance(route, Route)})
    app.add_middleware(Gate, state=state, access=access)
    app.add_middleware(Door, max_body_bytes=config.max_body_bytes)
    return app
