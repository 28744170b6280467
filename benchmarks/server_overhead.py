"""Requests/s of the server over HTTP against the offline engine, on the same workload at the same concurrency.

    .venv/bin/python benchmarks/server_overhead.py [--stream] [--model-path FOLDER]

Both run the same model with the same settings, in processes of their own, in turn and several times over; only one
works at a time. The workload: distinct prompts of 256 tokens, 128 tokens of answer each, nothing cached before. The
offline engine gets all prompts in one call and runs `concurrency` of them at a time; the server gets them from as many
clients, each of which sends its next request when the one before was answered. `--stream` has the answers streamed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import httpx
import numpy as np

import rootcellar

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import Server

# Bytes of a stream's newest events that a client keeps: the last event, with all of the answer, is among them.
_TAIL = 2**12
SETTINGS = {"max_total_tokens": 16384, "chunked_prefill_size": 512}


def prompts(args: argparse.Namespace, round: int) -> list[list[int]]:
    """Random token ids; no two prompts of any round begin alike."""
    rng = np.random.default_rng(round)
    return rng.integers(0, 1000, (args.requests, args.input_len)).tolist()


def sampling(args: argparse.Namespace) -> dict[str, object]:
    return {"temperature": 0, "max_new_tokens": args.output_len, "ignore_eos": True}


def offline(args: argparse.Namespace) -> None:
    """The worker: reads round numbers, writes seconds."""
    with rootcellar.Engine(model_path=args.model_path, max_running_requests=args.concurrency, **SETTINGS) as engine:
        engine.warm_up()
        print("ready", flush=True)
        for line in sys.stdin:
            ids = prompts(args, int(line))
            began = time.perf_counter()
            engine.generate(input_ids=ids, sampling_params=sampling(args))
            print(time.perf_counter() - began, flush=True)


class Client(asyncio.Protocol):
    """Sends the requests that are left, one after the other, over one connection that is kept open.

    Of an answer it looks for the end alone: the cores on which it runs are the server's too, and a client that reads
    with asyncio's streams takes as much of them for a token as half of the server's event loop.
    """

    def __init__(self, bodies: list[bytes], output_len: int) -> None:
        """``bodies``: of requests, shared with other clients; ``output_len``: tokens that each answer must have."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.events = 0
        self._bodies = bodies
        self._said = f'"completion_tokens":{output_len}'.encode()
        self._length: int | None = None
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._answer, self._length = b"", None
        if not self._bodies:
            self._transport.close()
            self.ended.set_result(None)
            return
        body = self._bodies.pop()
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: ")
        if not self._answer:
            lines = data.lower().partition(b"\r\n\r\n")
            length = lines[0].partition(b"content-length:")[2].partition(b"\r\n")[0]
            self._length = int(length) + len(lines[0]) + 4 if length else None
        self._answer += data
        if self._length is None:  # the end of chunks; in a chunk no two lines end so, since none of JSON's ends with \r
            if not data.endswith(b"0\r\n\r\n"):
                self._answer = self._answer[-_TAIL:]
                return
        elif len(self._answer) < self._length:
            return
        assert self._said in self._answer, self._answer[:500]
        self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server closed the connection"))


async def over_http(url: str, args: argparse.Namespace, round: int) -> tuple[float, float]:
    """Seconds for all requests from `concurrency` clients, and how many events of streams came for each token."""
    bodies = [
        json.dumps({"input_ids": ids, "sampling_params": sampling(args), "stream": args.stream}).encode()
        for ids in prompts(args, round)
    ]
    host, port = url.removeprefix("http://").split(":")
    loop, tokens = asyncio.get_running_loop(), len(bodies) * args.output_len
    began = time.perf_counter()
    made = [
        await loop.create_connection(lambda: Client(bodies, args.output_len), host, int(port))
        for _ in range(args.concurrency)
    ]
    await asyncio.gather(*(client.ended for _, client in made))
    return time.perf_counter() - began, sum(client.events for _, client in made) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model-path", default="demo")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.offline:
        offline(args)
        return
    worker = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--offline"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    words = ["--max-running-requests", str(args.concurrency), "--chunked-prefill-size", "512", "--log-level", "warning"]
    words += ["--model-path", args.model_path]
    with Server(*words, max_total_tokens=SETTINGS["max_total_tokens"], warm=True) as server:
        assert worker.stdout.readline() == "ready\n"
        while httpx.get(f"{server.url}/server_info").json()["programs_left"]:
            time.sleep(1)
        ratios, rates, events = [], [], []
        for turn in range(args.rounds + 1):  # the first warms up
            worker.stdin.write(f"{2 * turn}\n")
            worker.stdin.flush()
            alone = float(worker.stdout.readline())
            served, each = asyncio.run(over_http(server.url, args, 2 * turn + 1))
            if turn:
                events.append(each)
                ratios.append(alone / served)
                rates.append((args.requests / alone, args.requests / served))
    worker.stdin.close()
    worker.wait()
    result = {
        "concurrency": args.concurrency,
        "stream": args.stream,
        "offline_requests_per_second": median(rate for rate, _ in rates),
        "server_requests_per_second": median(rate for _, rate in rates),
        "events_per_token": median(events),
        "ratio": median(ratios),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"offline {result['offline_requests_per_second']:.1f} requests/s")
    print(f"server  {result['server_requests_per_second']:.1f} requests/s, streamed: {args.stream}")
    print(f"events  {result['events_per_token']:.2f} a token")
    print(f"ratio   {result['ratio']:.3f} at concurrency {args.concurrency}, median of {result['ratios']}")


if __name__ == "__main__":
    main()
