"""How much of a prompt a recurrent model can take from the cache, next to what full attention could.

    .venv/bin/python benchmarks/recurrent_reuse.py [--json]

A workload of shared system prompts and branching conversations goes through the real scheduler and the real cache, with
a model that needs no arithmetic: every answer is known beforehand. Three caches, the same requests:

* ``full``: full attention only: every page of a shared prefix is a hit.
* ``rootcellar``: full attention and recurrent states, left where ``scheduler/snapshots.py`` says.
* ``ends only``: the same with a state at the end of each prompt and of each answer, and nowhere else. What these
  states stand for includes the request's own unique tokens, so a prompt that only shares its beginning finds none.

Everything is deterministic: the figures do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from rootcellar.cache import RadixCache, Tier, full, recurrent
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import Request, Scheduler, Snapshots

KV_TOKENS = 400_000
CONCURRENCY = 8
CHUNK = 512


class EndsOnly(Snapshots):
    """A state at the last page boundary of a prompt and, where it is one, at the end of the answer."""

    def stop(self, request: Request, stop: int) -> int:
        tail = (request.length - 1) // self.page_size * self.page_size
        return tail if request.computed < tail < stop else stop

    def due(self, request: Request, decode: bool) -> bool:
        tail = (request.length - 1) // self.page_size * self.page_size
        ended = request.finish is not None and request.computed % self.page_size == 0
        return ended or (not decode and request.computed == tail)


@dataclass
class Turn:
    """One request of a conversation: what comes before it, what is asked, what will be answered."""

    before: list[int]
    question: list[int]
    answer: list[int]

    @property
    def history(self) -> list[int]:
        return self.before + self.question + self.answer


@dataclass
class Workload:
    """Applications with system prompts of their own, and conversations that go on and branch.

    A third of the requests begin a conversation under one of ``systems`` prompts of 300 to 3,000 tokens, some far more
    popular than others. The others go on with one of the last 24: from its newest turn (70 %), or from an earlier one,
    as when an answer is asked for again or a question is edited.
    """

    requests: int = 600
    systems: int = 16
    seed: int = 0
    served: list[list[Turn]] = field(default_factory=list)

    def turns(self):
        rng = random.Random(self.seed)
        token = lambda: rng.randrange(50_000)  # noqa: E731
        prompts = [[token() for _ in range(rng.randint(300, 3000))] for _ in range(self.systems)]
        weights = [1 / (rank + 1) for rank in range(self.systems)]
        recent: deque[list[Turn]] = deque(maxlen=24)
        for _ in range(self.requests):
            question = [token() for _ in range(rng.randint(20, 200))]
            answer = [token() for _ in range(rng.randint(20, 200))]
            if not recent or rng.random() < 1 / 3:
                recent.append([Turn(rng.choices(prompts, weights)[0], question, answer)])
                yield recent[-1][-1]
                continue
            turns = rng.choice(recent)
            base = turns[-1] if rng.random() < 0.7 else rng.choice(turns)
            turn = Turn(base.history if rng.random() < 0.7 else base.before, question, answer)
            turns.append(turn)
            yield turn


def run(
    turns: list[Turn],
    page_size: int,
    states: int,
    snapshots: Snapshots | None,
    policy: str = "lru",
    check: bool = False,
) -> tuple[int, int]:
    """(hit tokens, prompt tokens) of a run; ``states`` 0: full attention only. ``check``: the cache's invariants."""
    kinds = [full("full", (0,))] + ([recurrent("state", (1,))] if states else [])
    capacity = {("full", Tier.DEVICE): KV_TOKENS} | ({("state", Tier.DEVICE): states} if states else {})
    cache = RadixCache(
        kinds, page_size=page_size, capacity=capacity, max_leases=CONCURRENCY, max_length=32_768, policy=policy
    )
    scheduler = Scheduler(cache, chunked_prefill_size=CHUNK, max_running_requests=CONCURRENCY, snapshots=snapshots)
    answers: dict[Request, list[int]] = {}
    waiting = deque(turns)
    hits = total = 0
    while waiting or not scheduler.idle:
        while waiting and len(scheduler.running) + len(scheduler.waiting) < CONCURRENCY:
            turn = waiting.popleft()
            sampling = SamplingParams(max_new_tokens=len(turn.answer))
            request = Request.new(str(len(answers)), np.asarray(turn.before + turn.question), sampling)
            answers[request] = turn.answer
            total += request.prompt_length
            scheduler.add(request)
        plan = scheduler.plan()
        assert plan is not None
        assert not scheduler.failed
        # The answer's next token is known; where a chunk does not end its request, the value is ignored.
        scheduler.advance(plan, [[answers[c.request][c.request.generated]] for c in plan.chunks])
    hits = sum(request.cached or 0 for request in answers)
    if check:
        cache.check()
        cache.flush()
    return hits, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--states", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--interval", type=int, default=256)
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    turns = list(Workload(requests=args.requests).turns())
    results = []
    for page_size in args.page_size:
        most, total = run(turns, page_size, 0, None, args.policy)
        for states in args.states:
            ours, _ = run(turns, page_size, states, Snapshots(page_size, args.interval), args.policy)
            ends, _ = run(turns, page_size, states, EndsOnly(page_size, args.interval), args.policy)
            results.append(
                {
                    "page_size": page_size,
                    "states": states,
                    "full_hit_rate": round(most / total, 3),
                    "of_full": round(ours / most, 3),
                    "ends_only_of_full": round(ends / most, 3),
                }
            )
    if args.json:
        print(json.dumps({"requests": args.requests, "interval": args.interval, "results": results}, indent=1))
        return
    print(f"{args.requests} requests, {total} prompt tokens; {KV_TOKENS} tokens of KV; interval {args.interval}")
    print("page size | states | full attention hits | ours / full | ends only / full")
    for r in results:
        print(
            f"{r['page_size']:9} | {r['states']:6} | {r['full_hit_rate']:19.1%} | {r['of_full']:11.1%} | "
            f"{r['ends_only_of_full']:16.1%}"
        )


if __name__ == "__main__":
    main()
