"""Drop the KV cache and rebuild it at the true shapes of Qwen2.5-3B: exact bytes, no compilation, first token at once.

    .venv/bin/python benchmarks/drop_rebuild.py [--json]

Dummy weights in bfloat16 over four virtual CPU devices (tensor parallel 4), max_total_tokens=32768, page size 1: the
configuration in which a TPU v4-8 was measured to hold and drop 2,415,992,832 bytes in 36 buffers. Between the drop and
the rebuild a second set of weights is built, as after an optimiser's step.

A CPU computes bfloat16 through float32 copies of the weights, so the whole forward pass needs more than 24 GB. Without
``--whole`` the hidden size, the feed-forward and the vocabulary are cut to what fits in 8 GB; the KV cache has its true
shapes either way, and the output says which it was.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp

import rootcellar

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
SMALL_FORWARD = {"hidden_size": 256, "head_dim": 128, "intermediate_size": 1024, "vocab_size": 8192}
BUFFERS = 36
EXPECTED = 2_415_992_832


def live_bytes() -> int:
    gc.collect()
    return sum(a.nbytes for a in jax.live_arrays())


def resident_bytes() -> int:
    """What the process has in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="the true feed-forward and vocabulary as well")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG if args.whole else CONFIG | SMALL_FORWARD
        (Path(folder) / "config.json").write_text(json.dumps(config))
        result = {"forward": "whole" if args.whole else f"cut to {SMALL_FORWARD}"} | measure(Path(folder))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:38s} {value:,}" if isinstance(value, int) else f"{name:38s} {value}")
    return 0 if result["ok"] else 1


def measure(folder: Path) -> dict:
    engine = rootcellar.Engine(
        model_path=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        tp_size=4,
        page_size=1,
        max_total_tokens=32768,
        max_running_requests=1,
        chunked_prefill_size=16,
        device_memory="24GB",
        compilation_cache_dir="off",
    )
    with engine:
        pools = engine._parts.runner.pools["full"]
        began = time.perf_counter()
        _, tokens = generate(engine)
        first = time.perf_counter() - began  # the very first generate, compiling included
        fill(pools)
        live, resident = live_bytes(), resident_bytes()
        dropped = engine.release_memory_occupation("kv_cache")
        live_after, resident_after = live_bytes(), resident_bytes()
        weights = engine._parts.reload()  # a second set beside the first, as an optimiser would leave it
        engine.update_weights(weights)
        del weights
        before = live_bytes()
        compiled = engine.stats()["compilations"]
        began = time.perf_counter()
        rebuilt = engine.resume_memory_occupation("kv_cache")
        rebuild_seconds = time.perf_counter() - began
        added = live_bytes() - before
        firsts = [generate(engine)]
        for _ in range(4):  # the first token of five rebuilds: the median counts
            engine.release_memory_occupation("kv_cache")
            engine.resume_memory_occupation("kv_cache")
            firsts.append(generate(engine))
        again = median(seconds for seconds, _ in firsts)
        result = {
            "pool_shape": list(pools.buffers[0][0].shape),
            "kv_buffers": dropped["buffers"],
            "kv_bytes": dropped["bytes"],
            "live_bytes_given_back": live - live_after,
            "resident_bytes_given_back": resident - resident_after,
            "bytes_rebuilt": rebuilt["bytes"],
            "live_bytes_rebuilt": added,
            "compilations_by_rebuild_and_generate": engine.stats()["compilations"] - compiled,
            "first_generate_seconds": first,
            "rebuild_seconds": rebuild_seconds,
            "first_token_after_rebuild_seconds": again,
            "ratio": again / first,
            "same_tokens": all(again == tokens for _, again in firsts),
        }
    result["ok"] = bool(
        (dropped["buffers"], dropped["bytes"]) == (BUFFERS, EXPECTED)
        and result["live_bytes_given_back"] == rebuilt["bytes"] == added == EXPECTED
        and abs(result["resident_bytes_given_back"] - EXPECTED) < 0.05 * EXPECTED
        and result["compilations_by_rebuild_and_generate"] == 0
        and result["ratio"] <= 0.05
        and result["same_tokens"]
    )
    return result


def fill(pool) -> None:
    """Write every byte, as a full cache has: memory that was never touched is not the process's yet."""
    ones = jax.jit(lambda buffer: buffer + jnp.ones((), buffer.dtype), donate_argnums=0)
    pool.buffers = jax.tree.map(ones, pool.buffers)
    jax.block_until_ready(pool.buffers)


def generate(engine: rootcellar.Engine) -> tuple[float, list[int]]:
    """A prompt of 12 tokens and an answer of 4: seconds to its first token, and the answer."""
    done = engine.generate(input_ids=list(range(100, 112)), sampling_params={"temperature": 0, "max_new_tokens": 4})
    return done["meta_info"]["first_token_latency"], done["output_ids"]


if __name__ == "__main__":
    sys.exit(main())
