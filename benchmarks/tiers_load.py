"""Tiers under load: what copies cost those who decode, and what they give conversations that the device cannot hold.

    .venv/bin/python benchmarks/tiers_load.py --decode          # a decode step while pages come and go, and without
    .venv/bin/python benchmarks/tiers_load.py --conversations   # time to first token and throughput by tiers

Engines with the same load take turns in one process; the model is that of ``tiers.py``, or one with fewer layers.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import rootcellar
from tiers import CONFIG, processor

HOST = {"enable_hierarchical_cache": True, "hicache_ratio": 8.0}


def engines(stack, layers, tokens, **options):
    """An engine for each name of tiers in ``tokens``, whose device holds so many; what closes them is on ``stack``."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    Path(folder, "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    pages = {"path": str(folder / "pages"), "min_free_space": 0, "prefetch_threshold": 64}
    store = {"hicache_storage_backend": "file", "hicache_storage_backend_extra_config": json.dumps(pages)}
    tiers = {"none": {}, "host": HOST, "host + file": HOST | {"hicache_ratio": 1.0} | store}
    options = {"model_path": str(folder), "load_format": "dummy", "skip_tokenizer_init": True, **options}
    return {
        name: stack.enter_context(rootcellar.Engine(**options, **tiers[name], max_total_tokens=total))
        for name, total in tokens.items()
    }


def ask(engine, ids, most):
    sampling = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    return engine.generate(input_ids=ids, sampling_params=sampling)


def tokens_of(seed, count):
    return np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], count).tolist()


def moved(engine):
    """Bytes that every lane moved so far."""
    lanes = engine.stats()["copies"]
    return {name: lane["bytes"] for name, lane in lanes.items() if "queued_bytes" in lane}


def step_counts(engine):
    """Decode steps so far, and their seconds."""
    found = engine.sight.reading().distributions["step_seconds"]
    steps = next(each for labels, each in found if labels["phase"] == "decode")
    return steps.count, steps.sum


def decode(rounds, layers, batch, steps, length, prompts):
    """Seconds of a decode step of a batch, while another asks for so many ``prompts`` one after the other, half of them
    new and half such as come back; they take part in no decode step. With tiers the device has evicted by then what
    comes back; without, it holds everything: a prompt costs both the same computing. So both have one load where all
    prompts end before the batch does: ``beside`` says how many did.
    """
    own = batch * (64 + steps)
    tokens = {"none": rounds * own + (8 + rounds * prompts) * length, "host + file": own + 6 * length}
    with contextlib.ExitStack() as stack:
        found = engines(stack, layers, tokens, max_running_requests=batch + 2)
        old = [tokens_of([1, i], length) for i in range(8)]  # of which the device holds fewer
        for engine in found.values():
            for prompt in old:
                ask(engine, prompt, 1)
            ask(engine, [tokens_of([2, i], 64) for i in range(batch)], 4)
        before = {name: moved(engine) for name, engine in found.items()}
        seen = {name: [] for name in found}
        asked, beside = dict.fromkeys(found, 0), dict.fromkeys(found, 0)
        for i in range(rounds):
            for name in sorted(found, reverse=bool(i % 2)):
                engine, ended = found[name], threading.Event()

                def others(engine=engine, ended=ended, name=name):
                    for _ in range(prompts):
                        turn = asked[name] = asked[name] + 1
                        ask(engine, old[turn // 2 % 8] if turn % 2 else tokens_of([3, turn], length), 1)
                        beside[name] += not ended.is_set()

                thread = threading.Thread(target=others)
                count, seconds = step_counts(engine)
                thread.start()
                ask(engine, [tokens_of([4, i, j], 64) for j in range(batch)], steps)
                ended.set()
                thread.join()
                after = step_counts(engine)
                seen[name].append((after[1] - seconds) / (after[0] - count))
        bytes_moved = {lane: each - before["host + file"][lane] for lane, each in moved(found["host + file"]).items()}
    medians = {name: statistics.median(each) for name, each in seen.items()}
    ratios = [tiers / none for tiers, none in zip(seen["host + file"], seen["none"], strict=True)]
    return {"batch": batch, "step_seconds": medians, "ratio": statistics.median(ratios), "ratios": ratios,
            "asked": rounds * prompts, "beside": beside, "bytes": bytes_moved}  # fmt: skip


def conversations(layers, count, turns, clients):
    """Seconds to the first token from the second turn on, and tokens of answers a second, by tiers: ``count``
    conversations of which the device holds a quarter go on in turns.
    """
    begins, question, answer = 128, 48, 16
    longest = begins + turns * (question + answer)
    names = ("none", "host", "host + file")
    with contextlib.ExitStack() as stack:
        tokens = dict.fromkeys(names, max(clients + 1, count // 4) * longest)
        found = engines(stack, layers, tokens, max_running_requests=clients)
        pool = stack.enter_context(ThreadPoolExecutor(clients))
        history = {name: [tokens_of([5, i], begins) for i in range(count)] for name in names}
        first, seconds, cached = ({name: [] for name in names} for _ in range(3))
        for engine in found.values():
            ask(engine, tokens_of(6, begins), answer)
        for turn in range(turns):
            for name in names if turn % 2 else names[::-1]:

                def go_on(i, name=name, turn=turn):
                    history[name][i] += tokens_of([7, turn, i], question)
                    result = ask(found[name], history[name][i], answer)
                    history[name][i] += result["output_ids"]
                    return result["meta_info"]

                began = time.perf_counter()
                metas = list(pool.map(go_on, range(count)))
                if turn:  # of the first turn nobody has anything
                    seconds[name].append(time.perf_counter() - began)
                    first[name] += [each["first_token_latency"] for each in metas]
                    cached[name] += [each["cached_tokens"] / each["prompt_tokens"] for each in metas]
    rows = {
        name: {
            "first_token_seconds": statistics.median(first[name]),
            "answer_tokens_per_second": (turns - 1) * count * answer / sum(seconds[name]),
            "cached": statistics.mean(cached[name]),
        }
        for name in names
    }
    return {"conversations": count, "turns": turns, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--conversations", action="store_true")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="Fewer make a smaller model.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="Tokens of the prompts that come and go.")
    parser.add_argument("--prompts", type=int, default=8, help="That come and go in a round.")
    parser.add_argument("--count", type=int, default=64, help="Conversations.")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {}
    if args.decode or not args.conversations:
        found["decode"] = decode(args.rounds, args.layers, args.batch, args.steps, args.length, args.prompts)
    if args.conversations or not args.decode:
        found["conversations"] = conversations(args.layers, args.count, args.turns, args.clients)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{processor()}, load {os.getloadavg()[0]:.1f}, {args.layers} layers")
    if "decode" in found:
        row = found["decode"]
        steps = ", ".join(f"{name} {1000 * each:.1f} ms" for name, each in row["step_seconds"].items())
        lanes = ", ".join(f"{name} {each / 1e6:.0f} MB" for name, each in row["bytes"].items())
        print(f"decode step of {row['batch']}: {steps}; with tiers {row['ratio']:.3f} times as long; {lanes}")
        print(f"  rounds: {', '.join(f'{each:.3f}' for each in row['ratios'])}", end="; ")
        print(f"of {row['asked']} prompts beside: {row['beside']}")
    if "conversations" in found:
        rows = found["conversations"]["rows"]
        for name, row in rows.items():
            late = row["first_token_seconds"] / rows["none"]["first_token_seconds"]
            fast = row["answer_tokens_per_second"] / rows["none"]["answer_tokens_per_second"]
            print(f"{name:12} first token {late:.2f}, throughput {fast:.2f} of no tier; {row['cached']:.0%} cached")


if __name__ == "__main__":
    main()
