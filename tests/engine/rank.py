"""Run by the tests of ranks, once for each: engines that are one rank, as the lines that come say.

python rank.py RANK RANKS ADDRESS  <  a line each: ["name of a function below", {arguments}] as JSON  >  its result
"""

import json
import logging
import os
import sys
import time

import jax
from idle import always_load

import rootcellar
from rootcellar.errors import RootcellarError
from rootcellar.tiers.faulty import Faults, FaultyStore
from rootcellar.tiers.stores.file import FileStore
from rootcellar.tiers.stores.file_settings import read_settings
from rootcellar.tiers.stores.registry import BACKENDS

RANK, RANKS, ADDRESS = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ENGINES = []
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Gloo says there who is connected


def faulty(extra, identity):
    """A file store that fails now and then, is late, and loses pages."""
    store = FileStore(read_settings(extra, identity))
    return FaultyStore(store, Faults(fail=0.3, short=0.2, flip=0.1, delay=0.5), seed=RANK)


def start(**options):
    """A new engine, in the place of the one there is."""
    stop()
    settings = {"nnodes": RANKS, "node_rank": RANK, "dist_init_addr": ADDRESS, "tp_size": RANKS}
    engine = rootcellar.Engine(**settings, **options)
    ENGINES.append(always_load(engine))
    pool = next(iter(engine._parts.runner.pools.values()))
    return {
        "devices": (jax.device_count(), jax.local_device_count()),
        "heads": [pool.buffers[0][0].shape[2], pool.buffers[0][0].addressable_shards[0].data.shape[2]],
    }


def stop():
    """No engine any more."""
    while ENGINES:
        ENGINES.pop().shutdown()


def generate(prompts, most, **options):
    """Answers: tokens, and where prompts were found."""
    settings = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    before = time.perf_counter()
    results = ENGINES[0].generate(input_ids=prompts, sampling_params=settings, **options)
    return {
        "output_ids": [r["output_ids"] for r in results],
        "found": [r["meta_info"]["cached_tokens_details"] for r in results],
        "reasons": [r["meta_info"]["finish_reason"] for r in results],
        "seconds": time.perf_counter() - before,
    }


def slow(seconds):
    """From now on each step takes so long here."""
    runner = ENGINES[0]._parts.runner
    step = runner.step

    def late(*arguments):
        time.sleep(seconds)
        return step(*arguments)

    runner.step = late


def agreements(count):
    """Seconds of each of so many agreements about nothing."""
    loop = ENGINES[0]._loop

    def measure():
        began = time.perf_counter()
        for _ in range(count):
            loop.machine.agreed.noted()
            loop.machine.learn()
        return (time.perf_counter() - began) / count

    return loop.call(measure)


def stats():
    """Numbers of this rank's engine."""
    return ENGINES[0].stats()


def call(method, **arguments):
    """A method of the engine."""
    return getattr(ENGINES[0], method)(**arguments)


BACKENDS["faulty"] = faulty
logging.basicConfig()
for line in sys.stdin:
    name, arguments = json.loads(line)
    try:
        print(json.dumps([True, globals()[name](**arguments)]), flush=True, file=ANSWERS)
    except RootcellarError as error:
        print(json.dumps([False, f"{type(error).__name__}: {error}"]), flush=True, file=ANSWERS)
stop()
