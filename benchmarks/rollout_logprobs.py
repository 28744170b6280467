"""Logprobs of a rollout beside those of trainers: our forward in another engine, Tunix's, and float64.

    .venv-trainers/bin/python benchmarks/rollout_logprobs.py [--tokens 10000] [--temperatures 1.0,0.6] [--json]

The demo model answers the example's questions at each temperature, once as by default and once with
``enable_deterministic_inference``, with ``logprobs_mode="processed_logprobs"``. The same answers are then scored again
by an engine with other chunks, other batches and no cache (*ours*), by Tunix's forward of float32 (*Tunix*), and by one
of float64, with the same weights and the same angles (*float64*). Shown is the largest difference of any token.

Exit status 1 where, with ``enable_deterministic_inference``, ours differs in a bit, float64's by more than 1e-5, or
Tunix's by more than that. (Where Tunix's own forward is more than half as far from float64's, as with AVX-512: by that
and as much.)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from tunix.rl.common import compute_per_token_logps

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import tunix_grpo

import rootcellar
from rootcellar import demo
from rootcellar.models.config import load_config
from rootcellar.models.loader import load_params, tensors_from_params
from rootcellar.text import Tokenizer

ANSWER, BAR = 40, 1e-5
PAD, EOS = tunix_grpo.Words().pad_id(), tunix_grpo.Words().eos_id()
Weights = dict[str, NDArray[np.float64]]


def exact(weights: Weights, ids: NDArray[np.int64], temperature: float) -> NDArray[np.float64]:
    """Logprobs of ``ids`` after the first, of the demo model (a Qwen 2) in float64, angles as in float32."""
    heads, groups, width, n = 6, 3, 32, len(ids)
    frequencies = (1 / 10000 ** (np.arange(0, width, 2) / width)).astype(np.float32)  # as ours, and XLA's in trainers
    angles = (np.arange(n, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = weights[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return scaled

    def turned(x: NDArray[np.float64]) -> NDArray[np.float64]:
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(4):
        of = f"model.layers.{layer}."

        def linear(x: NDArray[np.float64], name: str, of: str = of) -> NDArray[np.float64]:
            return x @ weights[f"{of}{name}.weight"].T + weights.get(f"{of}{name}.bias", 0.0)

        hidden = norm(x, f"{of}input_layernorm.weight")
        q, k, v = (linear(hidden, f"self_attn.{name}_proj").reshape(n, -1, width) for name in "qkv")
        q, k = turned(q), turned(k)
        scores = np.einsum("thd,shd->hts", q, k.repeat(groups, axis=1)) / np.sqrt(width)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", shares, v.repeat(groups, axis=1)).reshape(n, heads * width)
        x = x + linear(mixed, "self_attn.o_proj")
        hidden = norm(x, f"{of}post_attention_layernorm.weight")
        gate = linear(hidden, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(hidden, "mlp.up_proj"), "mlp.down_proj")
    scores = norm(x, "model.norm.weight")[:-1] @ weights["model.embed_tokens.weight"].T / temperature
    scores -= scores.max(-1, keepdims=True)
    chosen: NDArray[np.float64] = scores[np.arange(n - 1), ids[1:]] - np.log(np.exp(scores).sum(-1))
    return chosen


def rollout(prompts: list[list[int]], temperature: float, fixed: bool, params: Any) -> tuple[np.ndarray, ...]:
    """Answers int32 [N, ANSWER], their logprobs, and those that another engine of ours gives them."""
    common: dict[str, Any] = {
        "model_path": "demo", "params": params, "skip_tokenizer_init": True, "logprobs_mode": "processed_logprobs",
        "enable_deterministic_inference": fixed, "max_total_tokens": 8192,
    }  # fmt: skip
    drawn = {"temperature": temperature, "max_new_tokens": ANSWER, "ignore_eos": True}
    with rootcellar.Engine(**common, max_running_requests=16) as engine:
        settings = [{**drawn, "seed": i} for i in range(len(prompts))]
        results = engine.generate(input_ids=prompts, sampling_params=settings, return_logprob=True)
    answers = np.array([result["output_ids"] for result in results], np.int32)
    said = [[value for value, *_ in result["meta_info"]["output_token_logprobs"]] for result in results]
    options = {"max_running_requests": 3, "chunked_prefill_size": 48, "disable_radix_cache": True}
    with rootcellar.Engine(**common, **options) as engine:
        again = [
            engine.generate(
                input_ids=[*prompt, *answer.tolist()],
                sampling_params={"temperature": temperature, "max_new_tokens": 0},
                return_logprob=True,
                logprob_start_len=len(prompt),
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    scored = [[value for value, *_ in result["meta_info"]["input_token_logprobs"]] for result in again]
    return answers, np.array(said, np.float32), np.array(scored, np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--temperatures", default="1.0,0.6")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cfg = load_config(demo.path())
    params = load_params(demo.path(), cfg, "float32")
    weights = {name: np.asarray(array, np.float64) for name, array in tensors_from_params(cfg, params)}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    graph, state = nnx.split(tunix_grpo.policy(mesh))
    tokenizer = Tokenizer(demo.path())
    system = {"role": "system", "content": tunix_grpo.SYSTEM}
    chats = [[system, {"role": "user", "content": question}] for question in tunix_grpo.QUESTIONS]
    ids = [tokenizer.chat(chat).ids for chat in chats]
    rows, good = [], True
    for temperature in map(float, args.temperatures.split(",")):
        for fixed in (False, True):
            asked = args.tokens * 6 // 5  # some answers end early, and count no further
            prompts = ids * (-(-asked // ANSWER // len(ids)) + 1)
            answers, said, scored = rollout(prompts, temperature, fixed, params)
            width = max(map(len, prompts))
            padded = np.array([[PAD] * (width - len(prompt)) + prompt for prompt in prompts], np.int32)
            theirs = np.concatenate([
                np.asarray(compute_per_token_logps(
                    graph, state, jnp.array(padded[i : i + 32]), jnp.array(answers[i : i + 32]), PAD, EOS,
                    temperature=temperature,
                )) for i in range(0, len(prompts), 32)
            ])  # fmt: skip
            whole = [np.concatenate([prompt, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
            true = np.array([exact(weights, each, temperature)[-ANSWER:] for each in whole])
            # Tunix masks what comes after the end of an answer.
            counts = (np.cumsum(answers == EOS, axis=1) - (answers == EOS) == 0) & ~np.cumsum(
                answers == PAD, axis=1
            ).astype(bool)
            row = {
                "temperature": temperature,
                "deterministic": fixed,
                "tokens": int(counts.sum()),
                "ours": float(np.abs(said - scored)[counts].max()),
                "Tunix": float(np.abs(said - theirs)[counts].max()),
                "float64": float(np.abs(said - true)[counts].max()),
                "Tunix beside float64": float(np.abs(theirs - true)[counts].max()),
                "mean beside float64": float(np.abs(said - true)[counts].mean()),
                "Tunix's mean beside float64": float(np.abs(theirs - true)[counts].mean()),
            }
            rows.append(row)
            theirs_off = row["Tunix beside float64"]
            near = row["Tunix"] <= (BAR if theirs_off <= BAR / 2 else BAR / 2 + theirs_off)
            good &= not fixed or (row["ours"] == 0 and row["float64"] <= BAR and near)
            if not args.json:
                print(row, flush=True)
    if args.json:
        print(json.dumps(rows))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
