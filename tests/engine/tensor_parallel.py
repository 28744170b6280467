"""Run by test_tensor_parallel.py in a process with four virtual devices: answers of checkpoints, each at one tp_size.

python tensor_parallel.py  <  a line each: {"folder", "tp_size", "prompts", "most"} as JSON   >  a line of results

With "store", a folder of pages: answers with host memory and that store behind it; then other options may follow.
With "given": answers of an engine that began with other weights and was given the checkpoint's.
With "load_format": bytes of each device while weights come to it.
"""

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
from idle import always_load, check_idle

import rootcellar
from alive import alive
from guesses import Knowing
from rootcellar.cache import Tier
from rootcellar.config import EngineConfig
from rootcellar.engine.build import _load
from rootcellar.models.config import load_config
from rootcellar.models.loader import load_params, tensors_from_params
from rootcellar.runner import Placement
from rootcellar.runner.batch import Batch


def gathered(runner):
    """Elements of the largest array that the largest decode step gathers from the devices."""
    rows = runner.shapes.decode_rows
    arguments = runner.arguments(Batch.padding(rows, 1, runner.programs.widths))
    program = runner.programs.step.lower(*arguments).compile().as_text()
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program)
    return max((math.prod(int(n) for n in shape.split(",") if n) for shape in shapes), default=0)


def answer(folder, tp_size, prompts, most, said=None):
    """Cold, from the cache, and after dropping it: the answers, and what lies where.

    ``said``: guesses are of these answers, and of some wrong tokens.
    """
    settings = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    guesses = Knowing(8)
    options = {} if said is None else {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": 7}
    with rootcellar.Engine(
        model_path=folder, tp_size=tp_size, skip_tokenizer_init=True, max_total_tokens=4096, chunked_prefill_size=32,
        max_running_requests=2, **options,
    ) as engine:  # fmt: skip
        if said is not None:
            guesses.answers = {tuple(prompt): tokens for prompt, tokens in zip(prompts, said, strict=True)}
            engine._parts.scheduler.guesses = guesses
        answers = [engine.generate(input_ids=prompts, sampling_params=settings) for _ in range(2)]
        engine.check()
        compiled = engine.stats()["compilations"]
        engine.release_memory_occupation("kv_cache")
        engine.resume_memory_occupation()
        again = engine.generate(input_ids=prompts, sampling_params=settings)
        runner = engine._parts.runner
        pool = next(iter(runner.pools.values())).buffers[0][0]
        return {
            "devices": jax.device_count(),
            "output_ids": [[r["output_ids"] for r in run] for run in (*answers, again)],
            "cached": [r["meta_info"]["cached_tokens"] for r in answers[1]],
            "pool": list(pool.shape),
            "on_each_device": sorted({tuple(s.data.shape) for s in pool.addressable_shards}),
            "compiled_by_rebuild": engine.stats()["compilations"] - compiled,
            "gathered": gathered(engine._parts.runner),
            "guessed": [guesses.right, guesses.guessed],
        }


def answer_given(folder, tp_size, prompts, most, given):
    """Of random weights, after the checkpoint's tensors came by their names, and after they came as parameters."""
    settings = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    cfg = load_config(folder)
    params = load_params(folder, cfg, jnp.float32)
    with rootcellar.Engine(
        model_path=folder, tp_size=tp_size, skip_tokenizer_init=True, max_total_tokens=4096, chunked_prefill_size=32,
        max_running_requests=2, load_format="dummy",
    ) as engine:  # fmt: skip
        ids, copied = [], []
        for update in (
            lambda: {"copied": []},
            lambda: engine.update_weights_from_tensor(dict(tensors_from_params(cfg, params))),
            lambda: engine.update_weights(params),
        ):
            copied.append(update()["copied"])
            answers = engine.generate(input_ids=prompts, sampling_params=settings)
            ids.append([each["output_ids"] for each in answers])
        return {"output_ids": ids, "copied": copied}


def bytes_while_loading(folder, tp_size, load_format):
    """Of each device the bytes of what is alive, whenever something was put anywhere, and those of the weights."""
    config = EngineConfig(model_path=folder, load_format=load_format)
    put, times = jax.device_put, []

    def on_each():
        found = Counter(dict.fromkeys(range(tp_size), 0))
        for array in alive():
            nbytes = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
            found.update({device.id: nbytes for device in array.sharding.device_set})
        return [found[device] for device in range(tp_size)]

    def putting(*args, **options):
        array = put(*args, **options)
        times.append(since())
        return array

    def since():
        return [now - then for now, then in zip(on_each(), before, strict=True)]

    before = on_each()
    jax.device_put = putting
    try:
        weights = _load(config, Path(folder), Placement(load_config(folder), tp_size), jnp.float32)
    finally:
        jax.device_put = put
    return {
        "times": times,
        "weights": since(),
        "whole": sum(leaf.nbytes for leaf in jax.tree.leaves(weights.params)),
    }


def answer_beside(folder, tp_size, prompts, most, store, **options):
    """With what the store has, and once more with nothing on the device: the answers, and where prompts were found."""
    settings = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    extra = {"path": store, "max_size": "64MiB", "min_free_space": 0, "prefetch_threshold": 16}
    engine = rootcellar.Engine(
        model_path=folder, tp_size=tp_size, skip_tokenizer_init=True, max_total_tokens=1024, chunked_prefill_size=32,
        max_running_requests=2, enable_hierarchical_cache=True, hicache_storage_backend="file",
        hicache_storage_backend_extra_config=json.dumps(extra), hicache_storage_prefetch_policy="wait_complete",
        **options,
    )  # fmt: skip
    with always_load(engine):
        first = engine.generate(input_ids=prompts, sampling_params=settings)
        engine._loop.call(lambda: evict(engine))
        again = engine.generate(input_ids=prompts, sampling_params=settings)
        check_idle(engine)
        return {
            "output_ids": [[r["output_ids"] for r in run] for run in (first, again)],
            "found": [[r["meta_info"]["cached_tokens_details"] for r in run] for run in (first, again)],
        }


def evict(engine):
    """Take everything from the device, once it was written down."""
    engine._loop.machine.life.settle()
    cache = engine._loop.machine.scheduler.cache
    for kind in cache.kinds:
        assert cache.make_room(kind.name, cache.stats().shelves[kind.name, Tier.DEVICE].size)


for line in sys.stdin:
    question = json.loads(line)
    asked = answer_beside if "store" in question else answer_given if "given" in question else answer
    asked = bytes_while_loading if "load_format" in question else asked
    print(json.dumps(asked(**question)), flush=True)
