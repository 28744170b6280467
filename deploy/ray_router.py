"""Ray Serve as a router: a replica for each server of SERVERS, chosen by Ray's prefix-aware router, on PORT.

POLICY=cache_aware (else Ray's own choice of the less busy of two). Chats and completions go through, streamed or whole;
what else a server offers is asked of the server. ``deploy/router.sh ray`` starts it.
"""

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

SERVERS = os.environ.get("SERVERS", "http://127.0.0.1:30001 http://127.0.0.1:30002").split()
# Where it is defined: what ray.serve.llm exports wants vLLM or SGLang installed.
PREFIXES = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"
ROUTING = {"request_router_config": RequestRouterConfig(request_router_class=PREFIXES)}

app = FastAPI()


@dataclass
class Asked:
    """What Ray's router looks at: the messages of a chat, or a prompt."""

    path: str
    body: bytes
    messages: Any
    prompt: Any


class Server:
    """Hands what it is asked to one of the servers: the one of its rank."""

    def __init__(self, servers: list[str]) -> None:
        rank = serve.get_replica_context().rank
        self._client = httpx.AsyncClient(base_url=servers[getattr(rank, "rank", rank) % len(servers)], timeout=600)

    async def ask(self, asked: Asked) -> AsyncIterator[bytes]:
        """The answer: its status and media type in a line, then its bytes as they come."""
        headers = {"Content-Type": "application/json"}
        async with self._client.stream("POST", asked.path, content=asked.body, headers=headers) as answer:
            yield f"{answer.status_code} {answer.headers.get('content-type', 'application/json')}".encode()
            async for part in answer.aiter_raw():
                yield part


@serve.ingress(app)
class Router:
    """The one address of all servers."""

    def __init__(self, servers: DeploymentHandle) -> None:
        self._servers = servers.options(stream=True)

    @app.post("/v1/{path:path}")
    async def post(self, path: str, request: Request) -> StreamingResponse:
        """To the server that has seen most of the prompt."""
        given = await request.json()
        prompt = None if "messages" in given else given.get("prompt") or ""
        asked = Asked(f"/v1/{path}", await request.body(), given.get("messages"), prompt)
        parts = self._servers.ask.remote(asked)
        status, kind = (await anext(parts)).decode().split(" ", 1)
        return StreamingResponse(parts, int(status), media_type=kind)


def main() -> None:
    """Serve until it is told to end."""
    routing = ROUTING if os.environ.get("POLICY", "cache_aware") == "cache_aware" else {}
    servers = serve.deployment(Server).options(
        num_replicas=len(SERVERS), max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, **routing
    )
    router = serve.deployment(Router).options(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(os.environ.get("PORT", "30000"))))
    serve.run(router.bind(servers.bind(SERVERS)))
    signal.sigwait([signal.SIGINT, signal.SIGTERM])
    serve.shutdown()


if __name__ == "__main__":
    main()
