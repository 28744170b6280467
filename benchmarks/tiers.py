"""Host memory as a tier: how fast pages are copied, against memcpy, and what a hit there costs a request.

    .venv/bin/python benchmarks/tiers.py --copies     # images of real models' sizes, pages of 16 and 64
    .venv/bin/python benchmarks/tiers.py --requests   # time to first token: device hit, host hit, cold

What is compared is measured in turns, in one process.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import rootcellar
from rootcellar.cache import Tier
from rootcellar.engine.copies import settle
from rootcellar.plan.stored import Heads, Latents
from rootcellar.pools import Pool
from rootcellar.pools.copying import copier
from rootcellar.pools.layouts import layout_of
from rootcellar.tiers.host import HostMemory

BYTES = 48 * 2**20  # copied at a time: more than the caches of a processor hold
MODELS = {
    "Qwen2.5-3B": (Heads(2, 128), 36),
    "DeepSeek-V3": (Latents(512, 64), 61),
    "Llama-4-Scout": (Heads(8, 128), 12),  # a group of its arena
}
CONFIG = {  # 100M parameters
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 32000, "hidden_size": 768,
    "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "torch_dtype": "float32",
}  # fmt: skip


def copies(rounds):
    """GB/s of each way and of memcpy, for each model and page size."""
    rows = []
    for model, (stored, layers) in MODELS.items():
        for page_size in (16, 64):
            one = layers * stored.token_elements(1) * 2 * page_size
            count = max(4, BYTES // one)
            pool = Pool(layout_of(stored, "bfloat16", page_size), layers, count)
            pages = np.random.default_rng(0).permutation(np.arange(1, count + 1)).astype(np.int32)
            copying, order = copier(pool), np.arange(count)
            images = HostMemory({"": count}, {"": one}).images[""]
            there, here = np.ones(count * one, np.uint8), np.ones(count * one, np.uint8)

            def up(copying=copying, images=images, order=order, pages=pages, pool=pool):
                copying.write(pages, copying.fetch(images, order))()
                jax.block_until_ready(pool.buffers)

            ways = {
                "memcpy": lambda there=there, here=here: np.copyto(there, here),
                "device to host": lambda copying=copying, images=images, order=order, pages=pages: copying.read(
                    pages, images, order
                )(),
                "host to device": up,
            }
            times = {name: [] for name in ways}
            for _ in range(rounds + 1):  # the first compiles, and takes the memory from the machine
                for name, way in ways.items():
                    began = time.perf_counter()
                    way()
                    times[name].append(time.perf_counter() - began)
            rates = {name: count * one / statistics.median(seen[1:]) / 1e9 for name, seen in times.items()}
            rows.append({"model": model, "page_size": page_size, "image_bytes": one, "copier": type(copying).__name__,
                         "gb_per_s": rates})  # fmt: skip
            pool.free()
    return rows


def requests(rounds, tokens):
    """Seconds to the first token of a prompt that is on the device, on the host, nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        with rootcellar.Engine(
            model_path=folder, load_format="dummy", skip_tokenizer_init=True, enable_hierarchical_cache=True,
            max_total_tokens=2 * tokens, max_running_requests=2,
        ) as engine:  # fmt: skip
            prompt = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], tokens).tolist()
            machine = engine._loop.machine

            def away(tier):
                settle(machine.scheduler, machine.life.mover)
                machine.scheduler.cache.forget_tier(tier)

            def first_token():
                result = engine.generate(
                    input_ids=prompt, sampling_params={"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
                )
                return result["meta_info"]["first_token_latency"], result["meta_info"]["cached_tokens_details"]

            seen = {"cold": [], "device": [], "host": []}
            for round in range(rounds + 1):
                for name, gone in (("cold", (Tier.DEVICE, Tier.HOST)), ("device", ()), ("host", (Tier.DEVICE,))):
                    for tier in gone:
                        engine._loop.call(lambda tier=tier: away(tier))
                    seconds, details = first_token()
                    where = max(details, key=details.get) if any(details.values()) else "cold"
                    assert where == name, details
                    if round:
                        seen[name].append(seconds)
            lanes = engine.stats()["copies"]
    found = {name: statistics.median(each) for name, each in seen.items()}
    rates = {name: lane["bytes"] / lane["seconds"] / 1e9 for name, lane in lanes.items()}
    return {"tokens": tokens, "first_token_seconds": found, "host_over_device": found["host"] / found["device"],
            "lanes_gb_per_s": rates}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", action="store_true")
    parser.add_argument("--requests", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {}
    if args.copies or not args.requests:
        found["copies"] = copies(args.rounds)
    if args.requests or not args.copies:
        found["requests"] = requests(args.rounds, args.tokens)
    if args.json:
        print(json.dumps(found))
        return
    for row in found.get("copies", ()):
        rates = row["gb_per_s"]
        shown = ", ".join(f"{name} {rate:.1f} ({rate / rates['memcpy']:.0%})" for name, rate in rates.items())
        print(f"{row['model']}, page {row['page_size']}, {row['image_bytes']} bytes, {row['copier']}: {shown} GB/s")
    if "requests" in found:
        row = found["requests"]
        seconds = ", ".join(f"{name} {1000 * each:.1f} ms" for name, each in row["first_token_seconds"].items())
        print(f"first token of {row['tokens']} tokens: {seconds}; host over device {row['host_over_device']:.2f}")
        print("lanes: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in row["lanes_gb_per_s"].items()))


if __name__ == "__main__":
    main()
