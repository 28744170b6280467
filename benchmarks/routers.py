"""Two servers behind routers of others: requests that land where their prefix is, hit rate, and time to first token.

    .venv/bin/python benchmarks/routers.py --router build/routers/*/bin/{smg,sglang-router,vllm-router,serve}

Sessions grow by a turn at a time, several at once, as chats of agents do. Each policy gets two servers that have
nothing cached; a turn has *landed* when most of the turn before came from the cache. Routers are installed in
environments of their own, as `deploy/router.sh` does: `smg`, `sglang-router`, `vllm-router`, or Ray's `serve`, whose
other policy is the less busy of two.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import Server

ROOT = Path(__file__).parents[1]

WORDS = ("shelf", "jar", "apple", "carrot", "cellar", "root", "sand", "winter", "label", "onion", "pear", "beet")


def start(router: str, port: int, policy: str, workers: list[str], quiet: bool) -> subprocess.Popen[Any]:
    """Start one of the routers."""
    options = ["--host", "127.0.0.1", "--port", str(port), "--policy", policy, "--worker-urls", *workers]
    words, environment = [router, *options], dict(os.environ)
    name = Path(router).name
    if name == "serve":
        words = [str(Path(router).with_name("python")), str(ROOT / "deploy" / "ray_router.py")]
        environment |= {"SERVERS": " ".join(workers), "PORT": str(port), "POLICY": policy}
    elif name != "vllm-router":
        words = [router, "launch", *options]
    out = subprocess.DEVNULL if quiet else None
    return subprocess.Popen(words, stdout=out, stderr=out, env=environment)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def healthy(client: httpx.AsyncClient, process: subprocess.Popen[Any]) -> None:
    """Wait until the router answers a chat."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "ready?"}], "max_tokens": 1}
    for _ in range(480):
        if process.poll() is not None:
            raise SystemExit(f"the router ended with status {process.returncode}")
        try:
            if (await client.post("/v1/chat/completions", json=body)).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        await asyncio.sleep(0.25)
    raise SystemExit("the router does not answer")


async def turn(client: httpx.AsyncClient, messages: list[dict[str, str]]) -> tuple[float, int, int, str]:
    """Seconds to the first token, prompt tokens, those of them that were cached, and the answer."""
    body = {
        "model": "demo", "messages": messages, "max_tokens": 8, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, text, usage = time.perf_counter(), 0.0, "", {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - began
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], text


async def session(
    client: httpx.AsyncClient, seed: int, turns: int, length: int, gate: asyncio.Semaphore
) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    messages = [{"role": "system", "content": f"Session {seed}. {words(length)}"}]
    rows, before = [], 0
    for _ in range(turns):
        messages.append({"role": "user", "content": words(20)})
        async with gate:
            first, prompt, cached, text = await turn(client, messages)
        rows.append(
            {"first": first, "prompt": prompt, "cached": cached, "landed": cached > 0.7 * before, "later": before > 0}
        )
        messages.append({"role": "assistant", "content": text})
        before = prompt
        await asyncio.sleep(rng.uniform(0, 0.05))
    return rows


async def measure(args: argparse.Namespace, router: str, policy: str) -> dict[str, Any]:
    """One policy of a router over two fresh servers."""
    with Server(max_total_tokens=args.tokens) as one, Server(max_total_tokens=args.tokens) as two:
        port = free_port()
        process = start(router, port, policy, [one.url, two.url], not args.verbose)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                await healthy(client, process)
                gate = asyncio.Semaphore(args.concurrency)
                found = await asyncio.gather(
                    *(session(client, i, args.turns, args.words, gate) for i in range(args.sessions))
                )
            counts = [
                json.loads(httpx.get(f"{server.url}/server_info").text)["internal_states"][0] for server in (one, two)
            ]
        finally:
            process.terminate()
            process.wait(60)
    rows = [row for each in found for row in each]
    later = [row for row in rows if row["later"]]
    return {
        "router": Path(router).name,
        "policy": policy,
        "requests": len(rows),
        "by_server": [sum(each["finished"].values()) for each in counts],
        "landed": mean(row["landed"] for row in later),
        "hit_rate": sum(row["cached"] for row in rows) / sum(row["prompt"] for row in rows),
        "first_token_ms": 1e3 * median(row["first"] for row in later),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", required=True, nargs="+", help="smg, sglang-router, vllm-router, serve (of Ray)")
    parser.add_argument("--policies", default="cache_aware,round_robin")
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--words", type=int, default=150, help="that a session begins with")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="of each server's cache")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="show what the router says")
    args = parser.parse_args()
    titles = f"{'by server':>12} {'landed':>7} {'hit rate':>8} {'first token':>11}"
    if not args.json:
        print(f"{'router':14} {'policy':12} {'requests':>8} {titles}", flush=True)
    rows = []
    for router, policy in itertools.product(args.router, args.policies.split(",")):
        rows.append(row := asyncio.run(measure(args, router, policy)))
        if not args.json:
            servers = "+".join(map(str, row["by_server"]))
            words = f"{row['router']:14} {row['policy']:12} {row['requests']:8} {servers:>12} {row['landed']:7.0%}"
            print(f"{words} {row['hit_rate']:8.0%} {row['first_token_ms']:8.0f} ms", flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
