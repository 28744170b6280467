"""The routes that show what goes on; the app includes the routers of one ``Observer``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Annotated

from fastapi import APIRouter, Query, Request
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response, StreamingResponse

from rootcellar.engine import Engine
from rootcellar.engine.sight import Reading
from rootcellar.server.errors import ApiError, json_response
from rootcellar.server.observe.feed import Feed
from rootcellar.server.observe.metrics import Source
from rootcellar.server.routes import AdminRoute, PublicRoute, UserRoute

# Seconds that a scrape waits for the step under way (it may be compiling) before it gets the reading before, and
# before it is refused when there is none.
PATIENCE, MOST_PATIENCE = 2.0, 30.0
Limit = Annotated[int, Query(ge=1, le=2000, description="At most so many.")]
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_PAGES = {"index.html": "/", "docs.html": "/docs"}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Observer:
    """What the server shows of one engine.

    Attributes:
        page: routes of the page's own files, which hold nothing of the engine.
        numbers: the route of the metrics.
        looks: routes that show prompts and who sent them: the tree, the trace, the feed.
    """

    def __init__(self, engine: Engine, *, model_name: str, sglang_metrics: bool = False) -> None:
        """Observe ``engine``; ``sglang_metrics``: give metrics under SGLang's names too."""
        self._sight = engine.sight
        self._source = Source(model_name, sglang=sglang_metrics)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._source)
        ProcessCollector(registry=self._registry)
        self._reading: asyncio.Task[Reading] | None = None
        self.feed = Feed(self._sight, self.read, model_name)
        self.page = self._page_router()
        self.numbers = APIRouter(route_class=UserRoute, tags=["observe"])
        self.looks = APIRouter(route_class=AdminRoute, tags=["observe"])
        self._add_numbers(self.numbers)
        self._add_looks(self.looks)

    async def close(self) -> None:
        """End the live feeds, which would otherwise keep the server from stopping."""
        await self.feed.close()

    async def read(self) -> Reading:
        """The engine's numbers now, or the last ones when a step takes longer than ``PATIENCE``.

        ``ApiError`` (503) when there are none and the engine does not come to rest.
        """
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(asyncio.to_thread(self._sight.reading))
        reading = self._reading
        done, _ = await asyncio.wait({reading}, timeout=PATIENCE if self._source.reading else MOST_PATIENCE)
        if done:
            self._source.reading = reading.result()
        if self._source.reading is None:
            raise ApiError(503, f"the engine has been busy for {MOST_PATIENCE:g} seconds", code="busy")
        return self._source.reading

    def _add_numbers(self, router: APIRouter) -> None:
        @router.get("/metrics", response_class=Response)
        async def metrics(request: Request) -> Response:
            """Metrics for Prometheus, as text or as OpenMetrics."""
            await self.read()
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
            return Response(encode(self._registry), headers={"Content-Type": content_type})

    def _add_looks(self, router: APIRouter) -> None:
        @router.get("/cache/tree", response_class=Response)
        async def cache_tree(limit: Limit = 200) -> Response:
            """The most important nodes of the radix tree and the requests that go through them."""
            return json_response(await asyncio.to_thread(self._sight.tree, limit))

        @router.get("/trace", response_class=Response)
        async def trace(limit: Limit = 256) -> Response:
            """The newest requests and their steps as a Chrome trace, for https://ui.perfetto.dev."""
            return json_response(await asyncio.to_thread(self._sight.trace, limit))

        @router.get("/feed", include_in_schema=False)  # it has no end, which no schema can say
        async def feed() -> Response:
            """What the page draws, as server-sent events: ``numbers`` each second, ``cache`` when it is cheap."""
            if self.feed.full:
                raise ApiError(503, "too many pages watch this server", code="busy", headers={"Retry-After": "10"})
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(self.feed.watch(), media_type="text/event-stream", headers=headers)

    def _page_router(self) -> APIRouter:
        """A route for each file."""
        router = APIRouter(route_class=PublicRoute)
        for name, content in _page_files().items():
            path = _PAGES.get(name, f"/page/{name}")
            router.add_api_route(path, _sender(name, content), methods=["GET", "HEAD"], include_in_schema=False)
        return router


def _page_files() -> dict[str, bytes]:
    folder = resources.files("rootcellar.server") / "page"
    return {file.name: file.read_bytes() for file in folder.iterdir() if _ending(file.name) in _TYPES}


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _sender(name: str, content: bytes) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, headers=_PAGE_HEADERS, media_type=_TYPES[_ending(name)])

    return send
