"""The routes that show what goes on; the app includes the routers of one ``Observer``."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Annotated

from fastapi import APIRouter, Query, Request
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response, StreamingResponse

from rootcellar.engine import Engine
from rootcellar.engine.sight import Reading
from rootcellar.server.callers import own_of
from rootcellar.server.errors import ApiError, json_response
from rootcellar.server.observe.feed import Feed
from rootcellar.server.observe.metrics import Source
from rootcellar.server.routes import OwnerRoute, PublicRoute, UserRoute

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

    A caller with a name sees what is its own, the admin everything.
    """

    def __init__(self, engine: Engine, *, model_name: str, sglang_metrics: bool = False) -> None:
        """Observe ``engine``; ``sglang_metrics``: give metrics under SGLang's names too."""
        self._sight = engine.sight
        self._model_name = model_name
        self._sglang = sglang_metrics
        self._tasks: dict[str | None, asyncio.Task[Reading]] = {}
        self._last: dict[str | None, Reading] = {}
        self._feeds: dict[str | None, Feed] = {}
        self._closed = False
        self.page = self._page_router()
        self.numbers = APIRouter(route_class=UserRoute, tags=["observe"])
        self.looks = APIRouter(route_class=OwnerRoute, tags=["observe"])
        self._add_numbers(self.numbers)
        self._add_looks(self.looks)

    async def close(self) -> None:
        """End the live feeds, which would otherwise keep the server from stopping."""
        self._closed = True
        for feed in self._feeds.values():
            await feed.close()

    async def read(self, tenant: str | None = None) -> Reading:
        """The engine's numbers now (or a tenant's), or the last ones when a step takes longer than ``PATIENCE``.

        ``ApiError`` (503) when there are none and the engine does not come to rest.
        """
        task = self._tasks.get(tenant)
        if task is None or task.done():
            task = self._tasks[tenant] = asyncio.create_task(asyncio.to_thread(self._sight.reading, tenant))
        done, _ = await asyncio.wait({task}, timeout=PATIENCE if tenant in self._last else MOST_PATIENCE)
        if done:
            self._last[tenant] = task.result()
        if tenant not in self._last:
            raise ApiError(503, f"the engine has been busy for {MOST_PATIENCE:g} seconds", code="busy")
        return self._last[tenant]

    def _feed(self, tenant: str | None) -> Feed:
        if tenant not in self._feeds:
            self._feeds[tenant] = Feed(self._sight, functools.partial(self.read, tenant), self._model_name, tenant)
        return self._feeds[tenant]

    def _add_numbers(self, router: APIRouter) -> None:
        @router.get("/metrics", response_class=Response)
        async def metrics(request: Request) -> Response:
            """Metrics for Prometheus, as text or as OpenMetrics."""
            tenant = own_of(request)
            registry = CollectorRegistry(auto_describe=False)
            registry.register(Source(await self.read(tenant), self._model_name, sglang=self._sglang))
            if tenant is None:
                ProcessCollector(registry=registry)
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
            return Response(encode(registry), headers={"Content-Type": content_type})

    def _add_looks(self, router: APIRouter) -> None:
        @router.get("/cache/tree", response_class=Response)
        async def cache_tree(request: Request, limit: Limit = 200) -> Response:
            """The most important nodes of the radix tree and the requests that go through them."""
            return json_response(await asyncio.to_thread(self._sight.tree, limit, own_of(request)))

        @router.get("/trace", response_class=Response)
        async def trace(request: Request, limit: Limit = 256) -> Response:
            """The newest requests and their steps as a Chrome trace, for https://ui.perfetto.dev."""
            return json_response(await asyncio.to_thread(self._sight.trace, limit, own_of(request)))

        @router.get("/feed", include_in_schema=False)  # it has no end, which no schema can say
        async def feed(request: Request) -> Response:
            """What the page draws, as server-sent events: ``numbers`` each second, ``cache`` when it is cheap."""
            feed = self._feed(own_of(request))
            if self._closed or feed.full:
                raise ApiError(503, "too many pages watch this server", code="busy", headers={"Retry-After": "10"})
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(feed.watch(), media_type="text/event-stream", headers=headers)

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
