"""What a rank that follows serves: whether it does. Everything else is rank 0's to answer."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import rootcellar
from rootcellar.engine import Engine
from rootcellar.errors import EngineError
from rootcellar.server.errors import ApiError, api_error, json_response

_HEALTH = ("/health", "/health_generate", "/ping", "/ready")


class FollowerApp:
    """The app of a rank other than 0."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._answer(scope["path"])(scope, receive, send)

    def _answer(self, path: str) -> Response:
        rank = self._engine.config.node_rank
        if path == "/version":
            return json_response({"version": rootcellar.__version__})
        if path not in _HEALTH:
            error = ApiError(421, f"this is rank {rank}, which follows: ask rank 0", code="not_rank_0")
            return error.response()
        try:
            self._engine.sight.asked_status()  # refused once it is over
        except EngineError as error:
            return api_error(error).response()
        return json_response({"status": "ok", "node_rank": rank})
