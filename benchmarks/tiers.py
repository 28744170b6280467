"""Host memory and a store as tiers: how fast pages are copied, against memcpy, and what a hit there costs a request.

    .venv/bin/python benchmarks/tiers.py --copies     # images of real models' sizes, pages of 16 and 64
    .venv/bin/python benchmarks/tiers.py --requests   # time to first token: device, host, store after a restart, cold

The last also has a store that is slowed until computing is faster than reading: what the engine then decides.

What is compared is measured in turns, in one process.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import rootcellar
from rootcellar.cache import Tier
from rootcellar.plan.stored import Heads, Latents
from rootcellar.pools import Pool
from rootcellar.pools.copying import copier
from rootcellar.pools.layouts import layout_of
from rootcellar.tiers.host import HostMemory
from rootcellar.tiers.stores.file import FileStore
from rootcellar.tiers.stores.file_settings import read_settings
from rootcellar.tiers.stores.registry import BACKENDS

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
            one = layers * stored.token_bytes("bfloat16") * page_size
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


class Throttled:
    """A file store that reads no faster than so many bytes a second."""

    verifies = True

    def __init__(self, store, bytes_per_second):
        self._store, self._speed = store, bytes_per_second
        self.has, self.put, self.clear, self.register, self.close = (
            store.has, store.put, store.clear, store.register, store.close,
        )  # fmt: skip

    def get(self, names, into):
        time.sleep(sum(view.nbytes for view in into) / self._speed)
        return self._store.get(names, into)


def throttled(extra, identity):
    """Opens a :class:`Throttled`; a row of the registry of stores."""
    own = dict(extra)
    speed = own.pop("bytes_per_second")
    return Throttled(FileStore(read_settings(own, identity)), speed)


def ask(engine, prompt):
    """The ``meta_info`` of one token after ``prompt``; nothing is under way afterwards."""
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    found = engine.generate(input_ids=prompt, sampling_params=sampling)["meta_info"]
    engine._loop.call(engine._loop.machine.life.settle)
    return found


def forget(engine, *tiers):
    """What these tiers hold is known to nobody any more; a store keeps it."""
    for tier in tiers:
        engine._loop.call(lambda tier=tier: engine._loop.machine.scheduler.cache.forget_tier(tier))


def where(found):
    """The tier that gave most of the prompt, or ``cold``."""
    details = found["cached_tokens_details"]
    return max(details, key=details.get) if any(details.values()) else "cold"


def requests(rounds, tokens, layers):
    """Seconds to the first token of a prompt that is on the device, on the host, in a store after a restart, nowhere;
    and of one whose store is so slow that it is computed instead.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        pages = {"path": str(Path(folder, "pages")), "min_free_space": 0}
        options = {
            "model_path": folder, "load_format": "dummy", "skip_tokenizer_init": True, "max_total_tokens": 8 * tokens,
            "max_running_requests": 2, "enable_hierarchical_cache": True, "hicache_storage_backend": "file",
            "hicache_storage_backend_extra_config": json.dumps(pages),
        }  # fmt: skip
        random = np.random.default_rng(1)
        prompt, *others = (random.integers(0, CONFIG["vocab_size"], tokens).tolist() for _ in range(rounds + 4))
        with rootcellar.Engine(**options) as engine:
            ask(engine, prompt)
        with rootcellar.Engine(**options) as engine:
            ask(engine, others.pop())  # the first of a shape may be slow
            first = ask(engine, prompt)
            ways = {"cold": (), "storage": tuple(Tier), "device": (), "host": (Tier.DEVICE,)}
            seen = {name: [] for name in ways}
            for _ in range(rounds):
                for name, gone in ways.items():
                    forget(engine, *gone)
                    seen[name].append(ask(engine, others.pop() if name == "cold" else prompt))
            lanes = engine.stats()["copies"]
            slow = slowly(engine, pages, prompt, others, seen["cold"], seen["storage"][-1])
    hits = {
        name: [each["first_token_latency"] for each in found if where(each) == name] for name, found in seen.items()
    }
    medians = {name: statistics.median(each) if each else math.nan for name, each in hits.items()}
    return {
        "tokens": tokens, "first_token_seconds": medians, "hits": {name: len(each) for name, each in hits.items()},
        "over_device": {name: each / medians["device"] for name, each in medians.items()},
        "first_after_restart": {"seconds": first["first_token_latency"], "from": where(first)},
        "stages": {name: found[-1]["stages"] for name, found in seen.items()},
        "lanes_gb_per_s": {
            name: lane["bytes"] / lane["seconds"] / 1e9 for name, lane in lanes.items() if lane.get("seconds")
        },
        "throttled": slow,
    }  # fmt: skip


def slowly(engine, pages, prompt, others, cold, stored):
    """The prompt when reading it takes twice as long as computing it: once to measure that, then beside the others.

    ``others``: prompts that nobody has seen; ``cold``: what came of such ones, ``stored``: of ``prompt`` in a store.
    """
    computed = statistics.median(each["first_token_latency"] for each in cold)
    (decision,) = [each for each in stored["load_decisions"] if each["tier"] == "storage"]
    BACKENDS["throttled"] = throttled
    speed = decision["bytes"] / computed / 2
    slow = {**pages, "bytes_per_second": speed, "deadline": 60}
    engine.attach_storage("throttled", slow, prefetch_policy="wait_complete", replace=True)
    seen = {"tried": [], "cold": [], "weighed": []}
    for i in range(1 + len(others)):
        forget(engine, *Tier)
        seen["weighed" if i else "tried"].append(ask(engine, prompt))
        if i:
            seen["cold"].append(ask(engine, others[i - 1]))
    return {
        "gb_per_s": speed / 1e9,
        "first_token_seconds": {
            name: statistics.median(each["first_token_latency"] for each in found) for name, found in seen.items()
        },
        "decisions": {name: seen[name][-1]["load_decisions"] for name in ("tried", "weighed")},
        "from": {name: [where(each) for each in found] for name, found in seen.items()},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", action="store_true")
    parser.add_argument("--requests", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument(
        "--layers", type=int, default=CONFIG["num_hidden_layers"], help="Fewer make another, small model."
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {}
    if args.copies or not args.requests:
        found["copies"] = copies(args.rounds)
    if args.requests or not args.copies:
        found["requests"] = requests(args.rounds, args.tokens, args.layers)
    if args.json:
        print(json.dumps(found))
        return
    for row in found.get("copies", ()):
        rates = row["gb_per_s"]
        shown = ", ".join(f"{name} {rate:.1f} ({rate / rates['memcpy']:.0%})" for name, rate in rates.items())
        print(f"{row['model']}, page {row['page_size']}, {row['image_bytes']} bytes, {row['copier']}: {shown} GB/s")
    if "requests" in found:
        show(found["requests"])


def show(row):
    """Print what ``requests`` found."""
    print(f"first token of {row['tokens']} tokens, {processor()}, load {os.getloadavg()[0]:.1f}:")
    for name, seconds in row["first_token_seconds"].items():
        print(
            f"  {name:8} {1000 * seconds:8.1f} ms {row['over_device'][name]:7.2f} device hits, of {row['hits'][name]}"
        )
    first, slow = row["first_after_restart"], row["throttled"]
    print(f"  the first after the restart: {1000 * first['seconds']:.1f} ms, from {first['from']}")
    print("lanes: " + ", ".join(f"{name} {rate:.2f} GB/s" for name, rate in row["lanes_gb_per_s"].items()))
    print(f"a store of {slow['gb_per_s']:.4f} GB/s:")
    for name, seconds in slow["first_token_seconds"].items():
        print(f"  {name:8} {1000 * seconds:8.1f} ms, from {', '.join(slow['from'][name])}", end="")
        print("".join(f"; {decision}" for decision in slow["decisions"].get(name, ())))


def processor():
    """Its name."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


if __name__ == "__main__":
    main()
