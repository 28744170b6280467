"""Generated traces of shapes that a chat trace does not have. The same seed gives the same trace."""

from __future__ import annotations

import random
from collections.abc import Callable

from rootcellar.errors import ConfigError
from rootcellar.sim.trace import BLOCK, TraceRequest


class _Blocks:
    """Hands out block ids that were never used before."""

    def __init__(self) -> None:
        self.next = 0

    def take(self, count: int) -> list[int]:
        self.next += count
        return list(range(self.next - count, self.next))


def shared_prompts(count: int = 6000, seed: int = 0) -> list[TraceRequest]:
    """Applications with long system prompts and one-off questions.

    200 prompts of 2 to 24 blocks; which are popular (Zipf) drifts: every 20 requests two of them trade places. A
    question is 1 to 6 blocks and is never asked again.
    """
    rng, blocks = random.Random(seed), _Blocks()
    prompts = [blocks.take(rng.randint(2, 24)) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(len(prompts))]
    requests = []
    for i in range(count):
        if i % 20 == 0:
            a, b = rng.randrange(len(prompts)), rng.randrange(len(prompts))
            prompts[a], prompts[b] = prompts[b], prompts[a]
        ids = rng.choices(prompts, weights)[0] + blocks.take(rng.randint(1, 6))
        requests.append(TraceRequest(tuple(ids), len(ids) * BLOCK - rng.randrange(BLOCK), 200))
    return requests


def agents(count: int = 6000, seed: int = 0) -> list[TraceRequest]:
    """Agents that branch: each task grows a tree of contexts, and 24 tasks take turns.

    A step goes on from the newest context (70 %) or from any earlier one of the task, and adds 1 to 5 blocks; a task
    ends after 5 to 60 steps and a new one, below one of 4 shared tool descriptions of 12 blocks, takes its place.
    """
    rng, blocks = random.Random(seed), _Blocks()
    tools = [blocks.take(12) for _ in range(4)]

    def task() -> tuple[list[list[int]], int]:
        return [rng.choice(tools) + blocks.take(rng.randint(1, 4))], rng.randint(5, 60)

    tasks = [task() for _ in range(24)]
    requests = []
    for _ in range(count):
        turn = rng.randrange(len(tasks))
        contexts, left = tasks[turn]
        base = contexts[-1] if rng.random() < 0.7 else rng.choice(contexts)
        ids = base + blocks.take(rng.randint(1, 5))
        contexts.append(ids)
        tasks[turn] = (contexts, left - 1) if left > 1 else task()
        requests.append(TraceRequest(tuple(ids), len(ids) * BLOCK, 100))
    return requests


WORKLOADS: dict[str, Callable[[], list[TraceRequest]]] = {"shared-prompts": shared_prompts, "agents": agents}


def workload(name: str) -> list[TraceRequest]:
    """The generated trace of this name. Raises ``ConfigError`` naming the known ones."""
    if name not in WORKLOADS:
        raise ConfigError(f"there is no generated trace {name!r}; choose one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]()
