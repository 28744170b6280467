"""What a step of colocated RL holds on the devices, phase by phase, to the byte, at the KV shapes of Qwen2.5-3B.

    .venv/bin/python benchmarks/colocated_step.py [--figure FILE.svg] [--json]

Rollout, drop of the KV cache, gradients, Adam, new weights, KV cache back: over four virtual CPU devices (tensor
parallel 4), bfloat16, max_total_tokens=32768. The forward pass is that of ``drop_rebuild.py``, cut to what fits here;
the KV cache has its true shapes. Adam's moments wait in host memory during the rollout. The engine reads the trainer's
arrays, but for those whose KV heads it repeats, as there are more devices than heads.

Counted are the bytes of all arrays that live on devices, a replicated one on each: all are what they are known to be,
and whatever else there is must be the same in all phases.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterable
from html import escape
from math import prod
from pathlib import Path
from typing import Any

import drop_rebuild  # first: it asks for four devices

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import rootcellar
from rootcellar.models.decoder import forward, logits
from rootcellar.models.dense import make_mix_dense
from rootcellar.models.params import init_params, path_name

ROWS, LENGTH = 2, 32
KINDS = ("weights", "engine's copies", "KV cache", "gradients", "moments", "other")
COLORS = ("#2f6fb3", "#6aa5dc", "#c2571a", "#8a3f9e", "#2c7d4f", "#5b6470")


def on_devices(arrays: Iterable[jax.Array]) -> int:
    """Bytes of them on all devices."""
    shards = ((array, array.sharding.shard_shape(array.shape)) for array in arrays)  # to ask for one makes an array
    return sum(prod(shape) * array.dtype.itemsize * len(array.sharding.device_set) for array, shape in shards)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="max_total_tokens")
    parser.add_argument("--figure", type=Path, help="draw it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = drop_rebuild.CONFIG | drop_rebuild.SMALL_FORWARD
        (Path(folder) / "config.json").write_text(json.dumps(config))
        found = measure(Path(folder), args.tokens)
    if args.figure:
        args.figure.write_text(figure(found["phases"]))
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for phase, held in found["phases"].items():
            parts = ", ".join(f"{kind} {held[kind]:,}" for kind in KINDS if held[kind])
            print(f"{phase:36s} {sum(held.values()):15,}  {parts}")
        wrong = [what for what, right in found["known"].items() if not right]
        print(
            f"not as known: {', '.join(wrong)}" if wrong else "all as known, and nothing compiled after the first step"
        )
    return 0 if all(found["known"].values()) else 1


def measure(folder: Path, tokens: int) -> dict[str, Any]:
    """Bytes of each kind in each phase of a second step; the first one compiles."""
    phases: dict[str, dict[str, int]] = {}
    with rootcellar.Engine(
        model_path=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        tp_size=4,
        page_size=1,
        max_total_tokens=tokens,
        max_running_requests=ROWS,
        chunked_prefill_size=16,
        device_memory="24GB",
        compilation_cache_dir="off",
    ) as engine:
        runner, placement = engine._parts.runner, engine._parts.runner.placement
        cfg = placement.model
        whole = NamedSharding(placement.mesh, PartitionSpec())
        served = jax.tree.leaves(runner.params)
        weights, form = jax.tree.flatten(init_params(cfg, 0, jnp.bfloat16))
        same = [w.shape == s.shape for w, s in zip(weights, served, strict=True)]
        places = [s.sharding if alike else whole for s, alike in zip(served, same, strict=True)]
        held: dict[str, Any] = {"weights": jax.tree.unflatten(form, jax.device_put(weights, places))}
        held |= {"gradients": None, "moments": None}
        engine.update_weights(held["weights"])
        del weights, served
        optimiser = optax.adam(1e-4)

        def loss(params: Any, rows: jax.Array) -> jax.Array:
            hidden = forward(params, cfg, rows.reshape(-1), make_mix_dense(cfg, [LENGTH] * ROWS))
            scores = jax.nn.log_softmax(logits(params, cfg, hidden).reshape(ROWS, LENGTH, -1)[:, :-1])
            return -jnp.mean(jnp.take_along_axis(scores, rows[:, 1:, None], axis=-1))

        def apply(params: Any, gradients: Any, moments: Any) -> Any:
            updates, moments = optimiser.update(gradients, moments)
            return optax.apply_updates(params, updates), moments

        gradients_of = jax.jit(jax.grad(loss))
        away = jax.device_get(optimiser.init(held["weights"]))  # on the host, while the KV cache is here
        of_weights = jax.tree.unflatten(form, places)
        where = (away[0]._replace(count=whole, mu=of_weights, nu=of_weights), *away[1:])
        train = jax.jit(apply, donate_argnums=(0, 1, 2), out_shardings=(of_weights, where))

        def note(phase: str, kv: bool = False) -> None:
            gc.collect()
            known = {kind: on_devices(jax.tree.leaves(each)) for kind, each in held.items()}
            known["KV cache"] = on_devices(b for p in pools.values() for b in jax.tree.leaves(p.buffers)) if kv else 0
            mine = {id(array) for array in jax.tree.leaves(held["weights"])}
            known["engine's copies"] = on_devices(a for a in jax.tree.leaves(runner.params) if id(a) not in mine)
            other = on_devices(jax.live_arrays()) - sum(known.values())
            phases[phase] = {kind: {**known, "other": other}[kind] for kind in KINDS}

        pools = runner.pools
        prompts = [list(range(100 * i, 100 * i + LENGTH // 2)) for i in range(1, 1 + ROWS)]
        compiled = 0
        for _ in range(2):
            compiled = engine.stats()["compilations"]
            sampling = {"max_new_tokens": LENGTH // 2, "ignore_eos": True, "seed": 1}
            answers = engine.generate(input_ids=prompts, sampling_params=sampling)
            rows = np.array([p + a["output_ids"] for p, a in zip(prompts, answers, strict=True)], np.int32)
            note("rollout", kv=True)
            dropped = engine.release_memory_occupation()  # and the engine lets go of the weights
            note("KV cache dropped")
            held["gradients"] = gradients_of(held["weights"], rows)
            note("gradients")
            held["moments"] = jax.device_put(away, where)
            note("Adam's moments come from the host")
            held["weights"], held["moments"] = train(held["weights"], held.pop("gradients"), held["moments"])
            held["gradients"] = None
            note("weights updated")
            away, held["moments"] = jax.device_get(held["moments"]), None
            copied = set(engine.update_weights(held["weights"])["copied"])
            note("moments go to the host")
            engine.resume_memory_occupation()
            note("KV cache back", kv=True)
        compilations = engine.stats()["compilations"] - compiled
        nbytes = on_devices(jax.tree.leaves(held["weights"]))
        read = jax.tree_util.tree_leaves_with_path(runner.params)
        copies = on_devices(array for path, array in read if path_name(path) in copied)
    count = 4 * np.dtype(np.int32).itemsize  # Adam's steps, on each device
    first, last = phases["rollout"], phases["KV cache back"]
    full = phases["Adam's moments come from the host"]
    known = {
        "the end is as the beginning": first == last,
        "KV cache": first["KV cache"] == dropped["bytes"] == 36 * 4 * 2 * 128 * 2 * (tokens + 1),
        "weights": all(held["weights"] == nbytes for held in phases.values()),
        "engine's copies": first["engine's copies"] == copies,
        "gradients and moments": (full["gradients"], full["moments"]) == (nbytes, 2 * nbytes + count),
        "other": all(held["other"] == first["other"] for held in phases.values()),
        "nothing compiled": compilations == 0,
    }
    return {"phases": phases, "known": known}


def figure(phases: dict[str, dict[str, int]]) -> str:
    """The phases as bars, in SVG."""
    left, width, row, top = 250, 560, 30, 44
    most = max(sum(held.values()) for held in phases.values())
    height = top + row * len(phases) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 110} {height}" font-size="13" '
        'font-family="-apple-system, Segoe UI, Noto Sans, Helvetica, Arial, sans-serif">',
        "<title>What a step of colocated RL holds on its devices</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    at = left
    for kind, color in zip(KINDS, COLORS, strict=True):
        parts.append(f'<rect x="{at}" y="14" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{at + 17}" y="25" fill="#1f2328">{kind}</text>')
        at += 112
    for i, (phase, held) in enumerate(phases.items()):
        y, x = top + row * i, float(left)
        parts.append(f'<text x="{left - 10}" y="{y + 15}" text-anchor="end" fill="#1f2328">{escape(phase)}</text>')
        for kind, color in zip(KINDS, COLORS, strict=True):
            long = width * held[kind] / most
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{long:.1f}" height="20" fill="{color}"/>')
            x += long
        total = f"{sum(held.values()) / 1e6:,.1f} MB"
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 15}" fill="#1f2328">{total}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(main())
