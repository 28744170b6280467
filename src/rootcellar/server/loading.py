"""The server before it is ready: it listens from the first moment, and says what it is waiting for.

A request that comes too early is refused, never kept: its client may be gone, and has others to ask.
"""

from __future__ import annotations

import html
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import rootcellar
from rootcellar.engine import Engine
from rootcellar.server.app import create_app
from rootcellar.server.door import Door
from rootcellar.server.errors import ApiError, json_response
from rootcellar.server.following import FollowerApp
from rootcellar.server.state import ServerState
from rootcellar.server_config import ServerConfig

log = logging.getLogger(__name__)

_SECONDS_TO_RETRY = "2"
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="1">
<title>rootcellar</title><h1>rootcellar</h1><p>Not ready yet: {progress}.</p></html>"""


class Loading:
    """The app that uvicorn runs: refusals until the engine is there, then the engine's own app.

    Attributes:
        progress: what is being done, for people.
        state: of the app, once requests are taken.
        engine: what was made, even when it was not ready in the end.
        error: why there will be no engine, or (of a rank that follows) is none any more.
        follows: whether it is there, and is a rank that follows.
    """

    def __init__(self, engine_options: dict[str, Any], config: ServerConfig) -> None:
        self._options = engine_options
        self._config = config
        self._early = Door(self._not_yet, config.max_body_bytes)
        self._app: ASGIApp | None = None
        self._stopped = False
        self.progress = "loading the model"
        self.state: ServerState | None = None
        self.engine: Engine | None = None
        self.error: BaseException | None = None
        self.follows = False

    def start(self, ready: Callable[[ServerState], None], failed: Callable[[], None]) -> None:
        """Load on a thread, which calls one of the two at its end."""
        threading.Thread(target=self._load, args=(ready, failed), name="rootcellar-loading", daemon=True).start()

    def stop(self) -> None:
        """Be ready for no more; what is under way is not waited for."""
        self._stopped = True

    def _load(self, ready: Callable[[ServerState], None], failed: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            engine = self.engine = Engine(**self._options)
            if engine.config.node_rank:
                self._follow(engine)
                failed()
                return
            if not self._config.skip_server_warmup:
                engine.programs.first(self._tell)
            app = create_app(engine, self._config)
        except BaseException as error:
            self.error = error
            failed()
            return
        if self._stopped:
            return
        self.state = app.state.server
        self._app = app
        ready(app.state.server)
        log.info("requests are taken, after %.1f seconds", time.monotonic() - began)
        if not self._config.skip_server_warmup:
            engine.programs.behind()

    def _follow(self, engine: Engine) -> None:
        """Be a rank that follows until the engine ends."""
        self._app = Door(FollowerApp(engine), self._config.max_body_bytes)
        self.follows = True
        log.info("rank %d of %d follows rank 0", engine.config.node_rank, engine.config.nnodes)
        engine.follow()

    def _tell(self, progress: str) -> bool:
        self.progress = progress
        log.info("%s", progress)
        return not self._stopped

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it."""
        await (self._app or self._early)(scope, receive, send)

    async def _not_yet(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"Retry-After": _SECONDS_TO_RETRY}
        if scope["path"] == "/version":
            response = json_response({"version": rootcellar.__version__})
        elif scope["path"] == "/":
            content = _PAGE.format(progress=html.escape(self.progress))
            policy = {"Content-Security-Policy": "default-src 'none'", "Cache-Control": "no-store"}
            response = Response(content, 503, {**headers, **policy}, media_type="text/html")
        else:
            error = ApiError(503, f"not ready yet: {self.progress}", code="loading", headers=headers)
            response = error.response()
        await response(scope, receive, send)
