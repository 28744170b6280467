"""The routes that show what goes on; ``Observer(...).router`` is included by the app."""

from __future__ import annotations

import asyncio
from importlib import resources
from typing import Annotated

import orjson
from fastapi import APIRouter, HTTPException, Query, Request
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response, StreamingResponse

from rootcellar.engine import Engine
from rootcellar.engine.sight import Reading
from rootcellar.server.observe.feed import Feed
from rootcellar.server.observe.metrics import Source

# A scrape waits so long for the step under way (it may be compiling) before it gets the reading before.
PATIENCE = 2.0
_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def _page_files() -> dict[str, bytes]:
    folder = resources.files("rootcellar.server") / "page"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES}


class Observer:
    """What the server shows of one engine.

    Attributes:
        router: ``/``, ``/page/...``, ``/metrics``, ``/cache/tree``, ``/trace``, ``/feed``.
        public_paths: those that hold nothing but the page's own files.
    """

    def __init__(self, engine: Engine, *, model_name: str, sglang_metrics: bool = False) -> None:
        """Observe ``engine``; ``sglang_metrics``: give metrics under SGLang's names too."""
        self._sight = engine.sight
        self._source = Source(model_name, sglang=sglang_metrics)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._source)
        ProcessCollector(registry=self._registry)
        self._reading: asyncio.Task[Reading] | None = None
        self._files = _page_files()
        self.feed = Feed(self._sight, self.read)
        self.public_paths = ("/", *(f"/page/{name}" for name in self._files))
        self.router = APIRouter()
        self._add_routes()

    async def close(self) -> None:
        """End the live feeds, which would otherwise keep the server from stopping."""
        await self.feed.close()

    async def read(self) -> Reading:
        """The engine's numbers now, or the last ones when a step takes longer than ``PATIENCE``."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(asyncio.to_thread(self._sight.reading))
        reading = self._reading
        done, _ = await asyncio.wait({reading}, timeout=PATIENCE if self._source.reading else None)
        if done:
            self._source.reading = reading.result()
        assert self._source.reading is not None
        return self._source.reading

    def _add_routes(self) -> None:
        router = self.router

        @router.get("/metrics", tags=["observe"], response_class=Response)
        async def metrics(request: Request) -> Response:
            """Metrics for Prometheus, as text or as OpenMetrics."""
            await self.read()
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
            return Response(encode(self._registry), headers={"Content-Type": content_type})

        @router.get("/cache/tree", tags=["observe"], response_class=Response)
        async def cache_tree(limit: Annotated[int, Query(ge=1, le=2000)] = 200) -> Response:
            """The most important nodes of the radix tree and the requests that go through them."""
            return _json(await asyncio.to_thread(self._sight.tree, limit))

        @router.get("/trace", tags=["observe"], response_class=Response)
        async def trace(limit: Annotated[int, Query(ge=1, le=2000)] = 256) -> Response:
            """The newest requests and steps as a Chrome trace, for https://ui.perfetto.dev."""
            return _json(await asyncio.to_thread(self._sight.trace, limit))

        @router.get("/feed", tags=["observe"], response_class=StreamingResponse)
        async def feed() -> Response:
            """What the page draws, as server-sent events: ``numbers`` each second, ``cache`` when it is cheap."""
            if self.feed.full:
                raise HTTPException(503, "too many pages watch this server already", {"Retry-After": "10"})
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(self.feed.watch(), media_type="text/event-stream", headers=headers)

        @router.get("/", include_in_schema=False)
        async def page() -> Response:
            return self._file("index.html")

        @router.get("/page/{name}", include_in_schema=False)
        async def page_file(name: str) -> Response:
            return self._file(name)

    def _file(self, name: str) -> Response:
        if name not in self._files:
            raise HTTPException(404, f"the page has no file {name!r}")
        return Response(self._files[name], headers=_PAGE_HEADERS, media_type=_TYPES[name.rpartition(".")[2]])


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
