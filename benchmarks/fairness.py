"""What one hostile client costs another: latency of one-token requests, idle and under each of a list of attacks.

    .venv/bin/python benchmarks/fairness.py [--attacks NAME,...] [--model-path FOLDER] [--quick] [--json]

A server gets two user keys. Its model, unless one is named, has the size and shape of SmolLM2-135M, an encoder of
pictures, and weights drawn at random. One client, the victim, asks for one token at a time. Another, in a process of
its own, sends one kind of request after the other, each as large as the server allows, over several connections at
once. For each kind: the victim's median and worst latency over its idle median of the same run, the longest step of the
engine, and how much the server's memory has grown.

The first row is a control: its client only keeps a core busy.

The bar: the worst is at most three idle medians and the longest step, memory grows by at most 256 MB, and the process
lives. Everything talks to 127.0.0.1, and each attack ends by itself. Victim, attacker and server share the machine, so
the attacker computes at the lowest priority.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from checkpoints import FAMILIES
from seeing import data_url, image_file, make_seeing
from serving import Server, resident

VICTIM, HOSTILE, ADMIN = "victim-key", "hostile-key", "admin-key"
VOCABULARY, CONTEXT = 1024, 4096
GROWTH = 256 * 10**6
# Of the model that is served unless one is named.
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": CONTEXT,
}  # fmt: skip
ENCODER = {"depth": 6, "hidden_size": 384, "intermediate_size": 1024, "num_heads": 6, "out_hidden_size": 576}
# Pixels of a picture of Qwen2.5-VL on one side, for each of its tokens.
SIDE = 28


@dataclass(frozen=True)
class Size:
    """How large attacks are: what the server allows, or a part of it."""

    prompts: int = 512
    answers: int = 128
    tokens: int = CONTEXT - 96
    stops: int = 256
    characters: int = 1_000_000
    items: int = 4000


SMALL = Size(prompts=64, answers=16, tokens=400, stops=64, characters=50_000, items=200)

Attack = Callable[[Size, random.Random], tuple[str, dict[str, Any]]]


def ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(16, VOCABULARY) for _ in range(n)]


def many_prompts(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    texts = [f"{rng.random()} what is a page?" for _ in range(size.prompts)]
    return "/v1/completions", {"prompt": texts, "max_tokens": 64, "ignore_eos": True}


def long_prompts(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    prompts = [ids(rng, size.tokens) for _ in range(16)]
    return "/generate", {"input_ids": prompts, "sampling_params": {"max_new_tokens": 1}}


def long_answers(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    sampling = {"max_new_tokens": size.tokens, "n": size.answers, "ignore_eos": True}
    return "/generate", {"input_ids": ids(rng, 20), "sampling_params": sampling}


def streamed_answers(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    path, body = long_answers(size, rng)
    return path, {**body, "stream": True}


def top_logprobs(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    body = {"input_ids": ids(rng, min(1500, size.tokens)), "sampling_params": {"max_new_tokens": 32, "n": 4}}
    return "/generate", {**body, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 20}


def penalties(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    sampling = {"max_new_tokens": 500, "n": size.answers, "ignore_eos": True, "frequency_penalty": 1.0,
                "temperature": 1.0, "top_p": 0.9, "top_k": 500, "min_p": 0.001}  # fmt: skip
    return "/generate", {"input_ids": ids(rng, 50), "sampling_params": sampling}


def schemas(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    names = [f"field_{rng.randrange(10**9)}" for _ in range(min(300, size.items))]
    properties = {name: {"type": "string", "pattern": "[a-z]{1,40}[0-9]{2,30}"} for name in names}
    schema = {"type": "object", "properties": properties, "required": names}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    messages = [{"role": "user", "content": "Answer."}]
    return "/v1/chat/completions", {"messages": messages, "response_format": form, "max_tokens": 200, "n": 16}


def deep_schemas(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    depth = min(2000, size.items)
    chain = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(depth)}
    schema = {"$defs": {**chain, f"a{depth}": {"const": rng.random()}}, "$ref": "#/$defs/a0"}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return "/v1/completions", {"prompt": "a", "response_format": form, "max_tokens": 10}


def stop_strings(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    stops = [f"{rng.random()} {'x' * 40}" for _ in range(size.stops)]
    return "/v1/completions", {"prompt": ["hi"] * 64, "max_tokens": 64, "stop": stops, "ignore_eos": True}


def long_texts(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    text = f"{rng.random()} why is the sky blue? " * (size.characters // 40)
    return "/tokenize", {"prompt": text}


def many_texts(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    texts = [f"{rng.random()} " + "why is the sky blue? " * 200 for _ in range(size.prompts)]
    return "/v1/completions", {"prompt": texts, "max_tokens": 1}


def wrong_messages(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": [rng.randrange(9)] * (50 * size.items)}


def long_names(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    name = f"{rng.random()}" * (size.characters // 20)
    return "/generate", {"text": "a", "rid": name, "extra_key": name, "sampling_params": {"max_new_tokens": 4}}


def long_chats(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{rng.random()} hello"} for i in range(size.items)]
    return "/v1/chat/completions", {"messages": messages, "max_tokens": 1}


def images(size: Size, rng: random.Random) -> tuple[str, dict[str, Any]]:
    side = SIDE * int(size.tokens**0.5)
    picture = data_url(image_file(rng.randrange(10**9), side, side, "JPEG"), "jpeg")
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is it?"}]
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}


ATTACKS: dict[str, Attack] = {
    each.__name__: each
    for each in (many_prompts, long_prompts, long_answers, streamed_answers, top_logprobs, penalties, schemas,
                 deep_schemas, stop_strings, long_texts, many_texts, wrong_messages, long_names, long_chats,
                 images)
}  # fmt: skip
# These send no body: they hold connections, or ask whether the server is well.
DOORS = ("connections", "health")
# Keeps a core busy as the others do and asks nothing: what the machine, and not the server, makes of the victim.
CONTROL = "nothing"


# ---- the attacker, in a process of its own ---------------------------------------------------------------------------


async def hostile(url: str, name: str, size: Size, seconds: float, connections: int) -> dict[str, int]:
    """Attack for so long; how many answers came, by status (0: none)."""
    until = time.monotonic() + seconds
    counts: dict[str, int] = {}
    bodies = []
    if name == CONTROL:
        while time.monotonic() < until:
            json.dumps(many_prompts(size, random.Random(name)))
            counts["made"] = counts.get("made", 0) + 1
        return counts
    if name not in DOORS:
        rng = random.Random(name)
        for _ in range(connections):
            path, body = ATTACKS[name](size, rng)
            bodies.append((path, json.dumps(body).encode()))
    headers = {"Authorization": f"Bearer {HOSTILE}", "Content-Type": "application/json"}
    limits = httpx.Limits(max_connections=connections)

    async def one(client: httpx.AsyncClient, turns: Iterator[int]) -> None:
        while time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.1, until - time.monotonic())):
                    try:
                        if name == "health":
                            status = (await client.get("/health")).status_code
                        else:
                            path, body = bodies[next(turns) % len(bodies)]
                            async with client.stream("POST", path, content=body) as response:
                                async for _ in response.aiter_raw():
                                    pass
                            status = response.status_code
                    except httpx.HTTPError:
                        status = 0
                    counts[str(status)] = counts.get(str(status), 0) + 1
                    if status in (0, 400, 413, 422, 429, 503):  # refused: as fast as a client would try again
                        await asyncio.sleep(0.01)

    if name == "connections":
        await hold_connections(url, until, connections, counts)
        return counts
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=seconds + 5, limits=limits) as client:
        turns = itertools.count()
        await asyncio.gather(*(one(client, turns) for _ in range(connections)))
    return counts


async def hold_connections(url: str, until: float, connections: int, counts: dict[str, int]) -> None:
    """Connections that send a header a byte at a time, opened again where the server closes them."""
    host, port = url.removeprefix("http://").split(":")

    async def one() -> None:
        while time.monotonic() < until:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
                counts["opened"] = counts.get("opened", 0) + 1
                writer.write(b"GET / HTTP/1.1\r\nX-A: ")
                while time.monotonic() < until and not writer.is_closing():
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(0.2)
                writer.close()
            except OSError:
                await asyncio.sleep(0.1)

    await asyncio.gather(*(one() for _ in range(connections)))


# ---- the victim ------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What one token took, in seconds: all, in the engine, before its first step."""

    all: float
    engine: float
    queue: float


def ask(connection: http.client.HTTPConnection, number: int) -> Asked:
    """Have one token computed."""
    sampling = {"max_new_tokens": 1, "temperature": 0}
    body = json.dumps({"text": f"{number} what is a page?", "sampling_params": sampling})
    headers = {"Authorization": f"Bearer {VICTIM}", "Content-Type": "application/json"}
    began = time.perf_counter()
    connection.request("POST", "/generate", body, headers)
    response = connection.getresponse()
    content = response.read()
    took = time.perf_counter() - began
    if response.status != 200:
        raise SystemExit(f"the victim was refused with {response.status}: {content[:300]!r}")
    meta = json.loads(content)["meta_info"]
    return Asked(took, meta["e2e_latency"], meta["queue_time"])


def times_of(url: str, numbers: Iterator[int], until: Callable[[int], bool]) -> list[Asked]:
    """Latencies of one request after the other, until ``until(how many)``; a little pause between two."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
    times: list[Asked] = []
    while not until(len(times)):
        times.append(ask(connection, next(numbers)))
        time.sleep(0.02)
    connection.close()
    return times


@dataclass
class Row:
    """What one attack did; seconds and bytes. Of the worst answer also its time in the engine, and in its queue."""

    attack: str
    asked: int
    idle: float
    median: float
    worst: float
    engine: float
    queue: float
    step: float
    grown: int
    answers: dict[str, int]

    @property
    def holds(self) -> bool:
        """Whether the bar is held."""
        return self.worst <= 3 * self.idle + self.step and self.grown <= GROWTH


def longest_step(url: str, since: float) -> float:
    """Seconds of the engine's longest step that ended after ``since`` seconds ago."""
    answer = httpx.get(f"{url}/trace", headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60)
    events = [e for e in answer.raise_for_status().json()["traceEvents"] if e.get("cat") == "step"]
    newest = max((e["ts"] + e["dur"] for e in events), default=0)
    return max((e["dur"] for e in events if e["ts"] + e["dur"] > newest - 1e6 * since), default=0) / 1e6


def attacked(url: str, name: str, args: argparse.Namespace, numbers: Iterator[int]) -> tuple[list[Asked], dict]:
    """The victim's latencies under one attack, and how the attacker was answered."""
    words = ["--attack", name, "--url", url, "--seconds", str(args.seconds), *(["--quick"] if args.quick else [])]
    with subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True) as attacker:
        assert attacker.stdout is not None
        try:
            attacker.stdout.readline()  # it begins
            times = times_of(url, numbers, lambda _: attacker.poll() is not None)
            return times, json.loads(attacker.stdout.read() or "{}")
        finally:
            attacker.kill()


def measure(server: Server, name: str, args: argparse.Namespace, numbers: Iterator[int]) -> Row:
    """The victim alone, then under one attack. A first, that is not measured, compiles what it needs."""
    attacked(server.url, name, args, numbers)
    settle(server.url)
    idle = median(asked.all for asked in times_of(server.url, numbers, lambda n: n >= args.idle))
    before, began = resident(server.pid), time.monotonic()
    times, answers = attacked(server.url, name, args, numbers)
    grown = max(0, resident(server.pid) - before)
    if server.process.poll() is not None:
        raise SystemExit(f"the server died of {name}: {server.log()[-2000:]}")
    settle(server.url)
    step = longest_step(server.url, time.monotonic() - began)
    worst = max(times)
    return Row(name, len(times), idle, median(t.all for t in times), *worst, step, grown, answers)


def settle(url: str, patience: float = 60) -> None:
    """Wait until the engine has nothing left of the attack."""
    headers = {"Authorization": f"Bearer {ADMIN}"}
    end = time.monotonic() + patience
    while time.monotonic() < end:
        (load,) = httpx.get(f"{url}/v1/loads", headers=headers, timeout=60).json()["loads"]
        if not load["num_total_reqs"]:
            return
        time.sleep(0.1)
    raise SystemExit(f"requests of an attacker that is gone still run after {patience:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ",".join([CONTROL, *ATTACKS, *DOORS])
    parser.add_argument("--attacks", default=everything, help="names, with commas between them")
    parser.add_argument("--quick", action="store_true", help="a part of what is allowed, for tests")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each attack")
    parser.add_argument("--idle", type=int, default=40, help="requests for the idle median")
    parser.add_argument("--max-total-tokens", type=int, default=16384)
    parser.add_argument("--model-path", help="a checkpoint of at least 4,096 tokens of context, or 'demo'")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.attack:
        os.nice(19)  # an attacker has a machine of its own: what it computes itself costs the victim nothing
        print("ready", flush=True)
        connections = (4 if args.quick else 16) * (16 if args.attack in DOORS else 1)
        size = SMALL if args.quick else Size()
        print(json.dumps(asyncio.run(hostile(args.url, args.attack, size, args.seconds, connections))))
        return
    keys = ["--api-key", f"victim:{VICTIM}", "--api-key", f"hostile:{HOSTILE}", "--admin-api-key", ADMIN]
    chunk = ["--chunked-prefill-size", "64", "--max-running-requests", "8"] if args.quick else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = args.model_path or ("demo" if args.quick else str(drawn(Path(folder))))
        model = [] if path == "demo" else ["--model-path", path, "--context-length", str(CONTEXT)]
        with Server(*keys, *chunk, *model, max_total_tokens=args.max_total_tokens, warm=not args.quick) as server:
            numbers = itertools.count()
            if not args.quick:
                wait_for_programs(server)
            times_of(server.url, numbers, lambda n: n >= 10)
            for name in args.attacks.split(","):
                row = measure(server, name, args, numbers)
                rows.append(row)
                if not args.json:
                    factor = row.worst / row.idle
                    print(
                        f"{name:17} idle {1e3 * row.idle:6.1f} ms, median {row.median / row.idle:6.1f} x, worst "
                        f"{factor:7.1f} x = {1e3 * row.worst:7.1f} ms "
                        f"({1e3 * row.engine:.0f} in the engine, {1e3 * row.queue:.0f} in its queue); "
                        f"longest step {1e3 * row.step:6.1f} ms, "
                        f"{row.grown / 1e6:5.0f} MB more; {'holds' if row.holds else 'BROKEN'}; {row.answers}",
                        flush=True,
                    )
    if args.json:
        print(json.dumps([asdict(row) | {"holds": row.holds} for row in rows]))


def drawn(folder: Path) -> Path:
    """The model that is served unless one is named, written to ``folder``."""
    vision = FAMILIES["qwen2-5-vl"]["vision_config"]
    return make_seeing(folder, vision_config={**vision, **ENCODER}, **SHAPE)


def wait_for_programs(server: Server, patience: float = 900) -> None:
    """Until nothing is left to compile: that is measured elsewhere."""
    end = time.monotonic() + patience
    while "compiled: all" not in server.log():
        if time.monotonic() > end:
            raise SystemExit(f"the server still compiles after {patience:.0f} s: {server.log()[-500:]}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
