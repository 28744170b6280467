"""Prefill and decode apart beside one engine with chunked prefill, on the same cores: what streams wait for tokens.

    .venv/bin/python benchmarks/disaggregation.py [--model-path FOLDER] [--rounds 3] [--json]

One server has two cores. Two servers, a prefill node and the decode node that is asked, have one of them each. Both
systems are up all the time and take turns: some clients stream answers, one after the other without a pause, while
others ask about a new long prompt every few seconds. Told of each system, as medians of the rounds: seconds between two
tokens of a stream (median and 99th percentile), tokens of streams a second, and seconds to the first token of a long
prompt. The client reads on both cores at the servers' priority, which takes little: of a lower one it would read late,
several tokens at once, where both cores are busy.

Two cores may be two hardware threads of one. What that alone costs is measured, too: streams of the decode node while
nothing computes on the other core, and beside loops there that have nothing to do with it.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np

from tiers import CONFIG, processor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import Server


class Pinned(Server):
    """A server that computes on some cores only."""

    def __init__(self, cores, *words, **options):
        super().__init__(*words, **options)
        self.words = ["taskset", "--cpu-list", ",".join(map(str, cores)), *self.words]


def systems(stack, args, cores):
    """The URL to ask, by name of a system."""
    folder = args.model_path
    words = ["--skip-tokenizer-init"]
    if folder is None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder, "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": args.layers}))
        words += ["--load-format", "dummy"]
    words += ["--model-path", folder, "--max-running-requests", str(args.streams + args.at_once)]
    if args.chunk:
        words += ["--chunked-prefill-size", str(args.chunk)]
    total = (args.streams * 2 + args.at_once * 8) * (args.length + args.steps)
    options = {"max_total_tokens": total, "warm": not args.quick}
    one = stack.enter_context(Pinned(cores, *words, **options))
    bootstrap = ["--disaggregation-bootstrap-port", str(args.bootstrap_port)]
    apart = [*words, *bootstrap, "--disaggregation-mode"]
    prefill = stack.enter_context(Pinned(cores[:1], *apart, "prefill", **options))
    decode = stack.enter_context(Pinned(cores[1:], *apart, "decode", "--prefill-url", prefill.url, **options))
    for server in () if args.quick else (one, prefill, decode):
        until = time.monotonic() + 900
        while "compiled: all" not in server.log():
            if time.monotonic() > until:
                raise SystemExit(f"a server still compiles: {server.log()[-500:]}")
            time.sleep(0.2)
    return {"one engine": one.url, "apart": decode.url}


LOOPS = {
    "alone": None,
    "beside a busy loop": "while True: pass",
    "beside a loop of matrix products": "import numpy as n\na = n.ones((256, 256), 'f')\nwhile True: a @ a",
}
"""What computes on the other core while the decode node streams, and no prompt is long."""


def controls(url, args, core):
    """What streams are like beside each of the loops, by its name."""
    found = {}
    for name, code in LOOPS.items():
        beside = None
        if code is not None:
            one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            words = ["taskset", "--cpu-list", str(core), sys.executable, "-c", code]
            beside = subprocess.Popen(words, env=one_thread)
        try:
            quiet = argparse.Namespace(**{**vars(args), "at_once": 0, "seconds": args.seconds / 2})
            found[name] = asyncio.run(load(url, quiet, 0))
        finally:
            if beside is not None:
                beside.kill()
                beside.wait()
    return found


def prompt(rng, length):
    return rng.integers(16, 1000, length).tolist()


async def stream(client, ids, most):
    """Moments at which tokens came."""
    body = {"input_ids": ids, "stream": True}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    async with client.stream("POST", "/generate", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"refused with {response.status_code}: {await response.aread()!r}")
        return [time.perf_counter() async for line in response.aiter_lines() if line.startswith("data: {")]


async def load(url, args, seed):
    """What one round of it is like: gaps between tokens, tokens a second, seconds to first tokens of long prompts."""
    rng = np.random.default_rng(seed)
    gaps, first, over = [], [], asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def streams():
            while not over.is_set():
                moments = await stream(client, prompt(rng, args.short), args.steps)
                gaps.extend(zip(moments, np.diff(moments), strict=False))

        async def long_prompts(wait):
            await asyncio.sleep(wait)
            while not over.is_set():
                began = time.perf_counter()
                moments = await stream(client, prompt(rng, args.length), 1)
                first.append(moments[0] - began)
                await asyncio.sleep(max(0, args.every - (time.perf_counter() - began)))

        began = time.perf_counter()
        tasks = [asyncio.create_task(streams()) for _ in range(args.streams)]
        tasks += [asyncio.create_task(long_prompts(i * args.every / args.at_once)) for i in range(args.at_once)]
        await asyncio.sleep(args.seconds)
        over.set()
        ended = time.perf_counter()
        await asyncio.gather(*tasks)
    within = [gap for moment, gap in gaps if moment < ended] or [ended - began]  # nothing came in time
    return {
        "gap": statistics.median(within),
        "gap_p99": float(np.percentile(within, 99)),
        "tokens_per_second": len(within) / (ended - began),
        "first_token": statistics.median(first) if first else 0.0,
        "long_prompts": len(first),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="of a checkpoint; else a model of random weights")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="of that one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40, help="of a round")
    parser.add_argument("--streams", type=int, default=16, help="clients that stream answers")
    parser.add_argument("--steps", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--short", type=int, default=32, help="tokens of a stream's prompt")
    parser.add_argument("--length", type=int, default=1000, help="tokens of a long prompt")
    parser.add_argument("--every", type=float, default=8, help="seconds between long prompts of a client")
    parser.add_argument("--at-once", type=int, default=2, help="clients that ask about long prompts")
    parser.add_argument("--chunk", type=int, help="chunked_prefill_size of all servers")
    parser.add_argument("--bootstrap-port", type=int, default=18998)
    parser.add_argument("--quick", action="store_true", help="no warm-up: for tests")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed, one for each node")
    with ExitStack() as stack:
        urls = systems(stack, args, cores)
        rows = {name: [] for name in urls}
        for url in urls.values():  # what is left to compile or to import
            asyncio.run(load(url, argparse.Namespace(**{**vars(args), "seconds": min(args.seconds, 10)}), 99))
        for i in range(args.rounds):
            for name in sorted(urls, reverse=bool(i % 2)):
                rows[name].append(asyncio.run(load(urls[name], args, i)))
        beside = {} if args.quick else controls(urls["apart"], args, cores[0])
    medians = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }
    ratios = [apart["gap_p99"] / one["gap_p99"] for apart, one in zip(rows["apart"], rows["one engine"], strict=True)]
    found = {"ratio_p99": statistics.median(ratios), "ratios": ratios, "systems": medians, "decode node": beside}
    if args.json:
        print(json.dumps(found))
        return
    print(f"{processor()}, load {os.getloadavg()[0]:.1f}")
    for name, row in medians.items():
        print(
            f"{name:10}: between tokens {1e3 * row['gap']:.0f} ms, p99 {1e3 * row['gap_p99']:.0f} ms; "
            f"{row['tokens_per_second']:.1f} tokens/s; first token of a long prompt {row['first_token']:.2f} s "
            f"({row['long_prompts']:.0f} of them)"
        )
    for name, row in beside.items():
        print(f"decode node {name}: between tokens {1e3 * row['gap']:.0f} ms, p99 {1e3 * row['gap_p99']:.0f} ms")
    print(f"p99 apart over one engine: {found['ratio_p99']:.2f}; rounds {', '.join(f'{r:.2f}' for r in ratios)}")


if __name__ == "__main__":
    main()
