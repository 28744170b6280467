"""One side of ``cache_core.py`` in a process of its own: reads one JSON object a line, answers with one.

    python benchmarks/core_worker.py rootcellar | sglang-rust | sglang-python | vllm

``{"prepare": row, "arguments": {...}}`` makes a task ready, ``{"measure": seconds, "most": n}`` takes samples of it, in
microseconds; the answer to either carries ``error`` where it failed and ``skip`` where the side does not offer the row.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys

from core_tasks import Rows, Skip, Task, measure

MODULES = {
    "rootcellar": "core_ours",
    "sglang-rust": "peer_sglang_rust",
    "sglang-python": "peer_sglang",
    "vllm": "peer_vllm",
}


def answer(request: dict, rows: Rows, task: Task | None) -> tuple[dict, Task | None]:
    """The answer to a request, and the task that is ready after it."""
    if "prepare" in request:
        make = rows.get(request["prepare"])
        if make is None:
            return {"skip": "not offered"}, None
        try:
            return {}, make(**request["arguments"])
        except Skip as reason:
            return {"skip": str(reason)}, None
    assert task is not None, "measure comes after prepare"
    samples = measure(task, request["measure"], request["most"])
    return {"samples": samples, "facts": task.facts}, task


def main(side: str) -> None:
    # What a library prints must not be taken for an answer.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if sys.platform == "linux":  # one core for all sides: another may be slower now
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    task = None
    rows: Rows = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            task = None  # before the next one takes its memory
            gc.collect()
        try:
            rows = rows or importlib.import_module(MODULES[side]).ROWS
            reply, task = answer(request, rows, task)
        except Exception as error:  # the parent reports it and goes on with the other sides
            reply, task = {"error": f"{type(error).__name__}: {error}"}, None
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1])
