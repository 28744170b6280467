"""Run by test_tensor_parallel.py in a process with four virtual devices: answers of checkpoints, each at one tp_size.

python tensor_parallel.py  <  a line each: {"folder", "tp_size", "prompts", "most"} as JSON   >  a line of results
"""

import json
import math
import re
import sys

import jax

import rootcellar
from rootcellar.runner.batch import Batch


def gathered(runner):
    """Elements of the largest array that the largest decode step gathers from the devices."""
    rows = runner.shapes.decode_rows
    arguments = runner.arguments(Batch.padding(rows, 1, runner.programs.widths))
    program = runner.programs.step.lower(*arguments).compile().as_text()
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program)
    return max((math.prod(int(n) for n in shape.split(",") if n) for shape in shapes), default=0)


def answer(folder, tp_size, prompts, most):
    """Cold, from the cache, and after dropping it: the answers, and what lies where."""
    settings = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    with rootcellar.Engine(
        model_path=folder, tp_size=tp_size, skip_tokenizer_init=True, max_total_tokens=4096, chunked_prefill_size=32,
        max_running_requests=2,
    ) as engine:  # fmt: skip
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
        }


for line in sys.stdin:
    print(json.dumps(answer(**json.loads(line))), flush=True)
