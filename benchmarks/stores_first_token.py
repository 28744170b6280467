"""Time to first token of a prompt that a store has, on every store, beside that of computing it.

    .venv/bin/python benchmarks/stores_first_token.py [--stores redis,hf3fs] [--tokens 2000] [--rounds 3] [--json]

The model has 100M parameters and random weights; components are started as the tests start them (``stores.py``). A
prompt is computed and written down, the device and the host forget it, and it is asked for again; medians are told.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

from stores import COMPONENTS, started, which
from tiers_load import tokens_of

import rootcellar
from rootcellar.scheduler import Rates
from tiers import CONFIG

PAGE = 64


def engine(folder, tokens):
    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    running = rootcellar.Engine(
        model_path=str(folder), load_format="dummy", skip_tokenizer_init=True, enable_hierarchical_cache=True,
        max_total_tokens=2 * tokens, max_running_requests=2, page_size=PAGE,
    )  # fmt: skip
    # Whatever it would weigh: what is there is loaded.
    running._loop.machine.recorder.meter.rates = lambda _stats, _now: Rates()
    return running


def first_token(running, ids):
    """Seconds, and how many tokens came from the store."""
    began = time.perf_counter()
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    meta = running.generate(input_ids=ids, sampling_params=sampling)["meta_info"]
    return time.perf_counter() - began, meta["cached_tokens_details"]["storage"]


def measure(running, component, tokens, rounds):
    """Medians of computing and of loading, and the tokens that were loaded."""
    running.attach_storage(component.backend, {**component.settings(), "deadline": 20}, prefetch_policy="wait_complete")
    computed, stored = [], []
    for _ in range(rounds):
        ids = tokens_of(time.time_ns(), tokens)
        computed.append(first_token(running, ids)[0])
        running._loop.call(running._loop.machine.life.settle)
        running.flush_cache()
        seconds, loaded = first_token(running, ids)
        stored.append(seconds)
        running.flush_cache()
    running.detach_storage()
    return {"computed": statistics.median(computed), "stored": statistics.median(stored), "loaded": loaded}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stores", type=which, default=",".join(COMPONENTS), help="which, by commas")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with ExitStack() as stack:
        model = stack.enter_context(tempfile.TemporaryDirectory())
        running = stack.enter_context(engine(model, args.tokens))
        first_token(running, tokens_of(1, args.tokens))  # compiles
        components = stack.enter_context(closing(started(args.stores)))
        rows = [{"store": name} | measure(running, each, args.tokens, args.rounds) for name, each, _ in components]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print("| store | computed | stored | of it from the store |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['store']} | {row['computed']:.2f} s | {row['stored']:.2f} s | {row['loaded']} tokens |")


if __name__ == "__main__":
    main()
