"""New weights from a trainer in another process, while requests run: whose each token is, and what an update costs.

    .venv/bin/python benchmarks/weight_updates.py [--updates 200] [--pause SECONDS] [--clients 4] [--before 1100]
        [--model-path FOLDER]

A server answers clients that ask without a break. A trainer, a process of its own, changes every weight and pushes all
(``WeightPusher``, ``on_weight_update="recompute"``), again and again. Afterwards the same versions are made here, and a
forward pass without a cache says what each version thinks of each answer: a token's logprob must be that of the version
which the answer names for it, and of none beside it. Also: programs that the server compiled after the second update,
bytes that it came to hold in the second half of the updates (the first ones take memory that is used from then on, and
requests before them fill what is remembered of the newest), what it held after each 50, the time of each update, and
bytes received and made.

Exit status 1 where a token is stale, something compiled, or the bytes of a version came to be held in the second half:
that is what the most that was ever held at once may still grow by, and of 200 updates none leaves a hundredth.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rootcellar.engine.build import folder_of
from rootcellar.integrations.pushing import WeightPusher
from rootcellar.models.config import load_config
from rootcellar.models.decoder import forward, logits
from rootcellar.models.dense import make_mix_dense
from rootcellar.models.loader import load_params, tensors_from_params
from rootcellar.models.repacking import params_of_tensors
from serving import Server, resident

LENGTH, ANSWER = 192, 48
TOLERANCE = 1e-4
EVERY = 50  # updates after which the server's memory is looked at


def first_weights(path: str) -> dict[str, jax.Array]:
    """The checkpoint's tensors in float32."""
    cfg = load_config(folder_of(path))
    return {name: jnp.array(a) for name, a in tensors_from_params(cfg, load_params(folder_of(path), cfg, jnp.float32))}


@jax.jit
def weights_of(first: Mapping[str, jax.Array], version: jax.Array) -> dict[str, jax.Array]:
    """Version 0 is the checkpoint; any other multiplies each tensor by a factor of its own."""
    phases = {name: zlib.crc32(name.encode()) % 628 / 100 for name in first}
    change = jnp.where(version > 0, 0.1, 0.0)
    return {name: a * (1 + change * jnp.sin(0.7 * version + phases[name])) for name, a in first.items()}


def train(args: argparse.Namespace) -> None:
    """The trainer's process: a line of JSON for each push."""
    first = first_weights(args.model_path)
    with WeightPusher(args.trainer) as pusher:
        for version in range(1, args.updates + 1):
            weights = jax.block_until_ready(weights_of(first, jnp.float32(version)))
            began = time.perf_counter()
            answer = pusher.push(weights, str(version), on_weight_update="recompute")
            seconds = time.perf_counter() - began
            told = {name: answer[name] for name in ("weight_version", "received_bytes")}
            print(json.dumps({**told, "copied": len(answer["copied"]), "seconds": seconds}), flush=True)
            time.sleep(args.pause)


def ask(url: str, answers: list[dict[str, Any]], ended: threading.Event, seed: int, vocabulary: int) -> None:
    """Ask until the end; prompts have one of a few beginnings."""
    rng = random.Random(seed)
    shared = [random.Random(each).choices(range(5, vocabulary - 5), k=40) for each in range(3)]
    with httpx.Client(base_url=url, timeout=120) as client:
        while not ended.is_set():
            prompt = rng.choice(shared) + rng.choices(range(5, vocabulary - 5), k=rng.randrange(1, 60))
            sampling = {"temperature": 1.0, "max_new_tokens": ANSWER, "ignore_eos": True}
            body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
            answer = client.post("/generate", json=body)
            answer.raise_for_status()
            answers.append({"prompt": prompt, **answer.json()})


def judge(path: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Each token's logprob beside that of the version it is labelled with, and of the one before that."""
    cfg, first = load_config(folder_of(path)), first_weights(path)

    @jax.jit
    def score(version: jax.Array, ids: jax.Array) -> jax.Array:
        params = params_of_tensors(cfg, weights_of(first, version), jnp.float32)
        hidden = forward(params, cfg, ids.reshape(-1), make_mix_dense(cfg, [LENGTH] * len(ids)))
        scores = jax.nn.log_softmax(logits(params, cfg, hidden).reshape(*ids.shape, -1)[:, :-1])
        return jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1)[..., 0]

    wanted: dict[int, list[tuple[int, int, int, int]]] = {}
    padded = np.zeros((len(answers), LENGTH), np.int32)
    said = []
    for row, answer in enumerate(answers):
        ids, meta = answer["prompt"] + answer["output_ids"], answer["meta_info"]
        padded[row, : len(ids)] = ids
        said.append(np.array([value for value, *_ in meta["output_token_logprobs"]]))
        spans = [*meta["weight_versions"], (None, len(answer["output_ids"]))]
        for (version, begin), (_, end) in itertools.pairwise(spans):
            if end > begin:
                wanted.setdefault(int(version), []).append((row, begin, end, 1))
                if int(version):
                    wanted.setdefault(int(version) - 1, []).append((row, begin, end, 0))
    wrong, other = [], []
    for number, parts in sorted(wanted.items()):
        for at in range(0, len(parts), 8):
            some = parts[at : at + 8]
            rows = [row for row, *_ in some] + [some[0][0]] * (8 - len(some))
            found = np.asarray(score(jnp.float32(number), padded[rows]))
            for (row, begin, end, right), scores in zip(some, found, strict=False):
                start = len(answers[row]["prompt"]) - 1
                gaps = np.abs(scores[start + begin : start + end] - said[row][begin:end])
                (wrong if right else other).append(gaps)
    gaps = np.concatenate(wrong)
    beside = np.concatenate(other)
    return {
        "answers": len(answers),
        "tokens": len(gaps),
        "versions": len({version for answer in answers for version, _ in answer["meta_info"]["weight_versions"]}),
        "answers_of_several": sum(len(answer["meta_info"]["weight_versions"]) > 1 for answer in answers),
        "stale": int((gaps > TOLERANCE).sum()),
        "largest": float(gaps.max()),
        "told_apart": float((beside > TOLERANCE).mean()),
    }


def compilations(url: str) -> int:
    """Programs that the server has compiled."""
    text = httpx.get(url + "/metrics", timeout=60).text
    found = re.search(r"^\S*compilations(?:_total)?(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
    assert found is not None, text[:2000]
    return int(float(found[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two pushes")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument(
        "--before",
        type=int,
        default=1100,
        help="requests answered before the first update: what is remembered of the newest is full then",
    )
    parser.add_argument("--model-path", default="demo")
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainer:
        train(args)
        return 0
    words = ["--model-path", args.model_path, "--dtype", "float32", "--page-size", "16"]
    with Server(*words, "--max-running-requests", str(args.clients), max_total_tokens=4096, warm=True) as server:
        while "compiled: all" not in server.log():
            time.sleep(0.1)
        found = measure(args, server)
    print(json.dumps(found, indent=2))
    flat = found["growth"] < found["received_bytes"]
    good = flat and not (found["stale"] or found["compiled"]) and found["told_apart"] > 0.9
    return 0 if good else 1


def measure(args: argparse.Namespace, server: Server) -> dict[str, Any]:
    """The whole run."""
    vocabulary = load_config(folder_of(args.model_path)).vocab_size
    answers: list[dict[str, Any]] = []
    ended = threading.Event()
    target = functools.partial(ask, server.url, answers, ended)
    threads = [threading.Thread(target=target, args=(i, vocabulary)) for i in range(args.clients)]
    settled = max(args.updates // 2, 1)
    pushes: list[dict[str, Any]] = []
    at_first = before = 0
    held: list[float] = []
    command = [sys.executable, __file__, "--trainer", server.url, "--updates", str(args.updates)]
    command += ["--pause", str(args.pause), "--model-path", args.model_path]
    with contextlib.ExitStack() as after:
        for thread in threads:
            thread.start()
            after.callback(thread.join)
        after.callback(ended.set)
        while len(answers) < args.before:
            assert all(thread.is_alive() for thread in threads), "a client failed"
            time.sleep(0.1)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
            assert trainer.stdout is not None
            for line in trainer.stdout:
                pushes.append(json.loads(line))
                if len(pushes) == 2:
                    at_first = compilations(server.url)
                if len(pushes) == settled:
                    before = resident(server.pid)
                if len(pushes) % EVERY == 0:
                    held.append(round(resident(server.pid) / 1e6, 1))
        assert trainer.returncode == 0, "the trainer failed"
    times = [push["seconds"] for push in pushes]
    return {
        "updates": len(pushes),
        **judge(args.model_path, answers),
        "compiled": compilations(server.url) - at_first,
        "growth": resident(server.pid) - before,
        f"megabytes_each_{EVERY}": held,
        "received_bytes": pushes[-1]["received_bytes"],
        "made_parameters": pushes[-1]["copied"],
        "seconds_median": median(times[1:] or times),
        "seconds_p99": quantiles(times[1:], n=100)[-1] if len(times) > 2 else times[-1],
    }


if __name__ == "__main__":
    raise SystemExit(main())
