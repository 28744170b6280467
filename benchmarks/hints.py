"""Sessions with gaps, live in an engine: what hints on the next turn keep, where LRU loses it; quotas; and leaks.

    .venv/bin/python benchmarks/hints.py                       # generated sessions, among chats that push them out
    .venv/bin/python benchmarks/hints.py --trace TRACE         # recorded ones, in Mooncake's form, with their real gaps

The same sessions run twice with the embedded model: with an LRU cache, and with each turn that comes after a long gap
announced (``next_turn``) by whoever leaves. Lengths are scaled: a block of 512 tokens becomes a page; time by
``--speed``. A turn counts where it was announced, and as far as that was granted: how much of it was a hit. Then
``--random`` hints on prompts of two tenants, and what is still kept when all of them have ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rootcellar
from rootcellar.cache.check import walk
from rootcellar.sim.trace import BLOCK, parse

WORDS = 900  # token ids of the embedded model that are plain text
TENANTS = ("a", "b")


@dataclass(frozen=True)
class Turn:
    """A prompt of a session at a time, in seconds; ``gap``: till the session's next one, None: there is none."""

    at: float
    session: int
    ids: NDArray[np.int64]
    gap: float | None = None


@dataclass
class Found:
    """What one run showed: of turns that were announced, what could have been hit and what was; who kept how much."""

    hits: list[tuple[int, int]] = field(default_factory=list)
    by_turn: dict[int, tuple[int, int]] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    promised: dict[int, int] = field(default_factory=dict)
    most: Counter[str] = field(default_factory=Counter)
    hit_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0


def generated(page: int) -> list[Turn]:
    """A coding agent's sessions that grow, among chats that never return."""
    rng, made = np.random.default_rng(0), []
    for session in range(8):
        ids, at = rng.integers(0, WORDS, 12 * page), float(rng.uniform(0, 200))
        for _ in range(10):
            made.append(Turn(at, session, ids))
            ids = np.concatenate([ids, rng.integers(0, WORDS, int(rng.integers(1, 4)) * page)])
            at += float(rng.choice([rng.uniform(5, 40), rng.uniform(320, 900)]))
    end = max(turn.at for turn in made)
    made += [Turn(float(rng.uniform(0, end)), 1000 + i, rng.integers(0, WORDS, 36 * page)) for i in range(300)]
    return with_gaps(made)


def recorded(path: str, page: int, first: int, most: int, longest: int) -> list[Turn]:
    """A trace's requests ``[first, first + most)``, each with its session: whose newest block they go on from."""
    with open(path, encoding="utf-8") as lines:
        rows = lines.readlines()
    requests, bad = parse(rows)
    if bad:
        raise SystemExit(f"{path}, line {bad[0].line}: {bad[0].reason}")
    sessions: dict[int, int] = {}
    made = []
    for request in requests:
        blocks = list(request.hash_ids)[: request.input_length // BLOCK]
        if len(blocks) < 2 or request.timestamp is None:
            continue
        session = next((sessions[block] for block in reversed(blocks) if block in sessions), len(sessions))
        sessions |= {block: session for block in blocks if block not in sessions}
        tokens = [np.random.default_rng(block).integers(0, WORDS, page) for block in blocks[:longest]]
        made.append(Turn(request.timestamp / 1000, session, np.concatenate(tokens)))
    return with_gaps(made[first : first + most])


def with_gaps(turns: list[Turn]) -> list[Turn]:
    """Turns in the order of their time, each with the gap to its session's next."""
    later: dict[int, float] = {}
    made = []
    for turn in sorted(turns, key=lambda each: -each.at):
        gap = later[turn.session] - turn.at if turn.session in later else None
        later[turn.session] = turn.at
        made.append(Turn(turn.at, turn.session, turn.ids, gap))
    return made[::-1]


async def replay(engine: rootcellar.Engine, turns: list[Turn], args: argparse.Namespace, hinted: bool) -> Found:
    """Each session's turns, the first at its time, each other so long after the answer before as its gap is."""
    speed, share = args.speed, args.share
    found, began = Found(), time.perf_counter()
    lines: dict[int, list[tuple[int, Turn]]] = defaultdict(list)
    for i, turn in enumerate(turns):
        lines[turn.session].append((i, turn))
    start = turns[0].at

    async def run(session: int, line: list[tuple[int, Turn]]) -> None:
        tenant, before = "others" if len(line) == 1 else TENANTS[session % 2], None
        await asyncio.sleep((line[0][1].at - start) / speed)
        for i, turn in line:
            result: Any = await engine.async_generate(
                input_ids=turn.ids.tolist(),
                sampling_params={"max_new_tokens": 1, "ignore_eos": True, "temperature": 0},
                tenant=tenant,
            )
            cached = result["meta_info"]["cached_tokens"]
            found.hit_tokens += cached
            found.tokens += len(turn.ids)
            if before is not None:
                same = turn.ids[: len(before)] == before[: len(turn.ids)]
                common = len(same) if same.all() else int(same.argmin())
                page = engine.config.page_size
                common = min(common, len(turn.ids) - 1) // page * page
                found.by_turn[i] = min(cached, common), common
            before = turn.ids
            if hinted and turn.gap is not None and turn.gap > args.gap:
                hints = {"next_turn": turn.gap / speed}
                told = await asyncio.to_thread(
                    engine.prefixes.hint, turn.ids.tolist(), hints, tenant=tenant, share=share, extra_key=""
                )
                found.answers[told[0]["answer"]] += 1
                if told[0]["tokens"]:
                    found.promised[next(j for j, _ in line if j > i)] = told[0]["tokens"]
                for name in TENANTS:
                    found.most[name] = max(found.most[name], kept(engine, name, share))
            await asyncio.sleep((turn.gap or 0.0) / speed)

    await asyncio.gather(*(run(session, line) for session, line in lines.items()))
    found.seconds = time.perf_counter() - began
    return found


def kept(engine: rootcellar.Engine, tenant: str, share: float) -> int:
    """Tokens that count as kept for a tenant now."""
    pins, limit = engine._loop.machine.pins, int(engine.total_tokens // 2 * share)
    return engine._loop.call(lambda: limit - min(pins.room(tenant, share), limit))


def leaks(engine: rootcellar.Engine, turns: list[Turn], count: int, share: float) -> dict[str, Any]:
    """So many random hints of two tenants while prompts come; what is kept after all have ended."""
    rng, most, answers = np.random.default_rng(1), 0, Counter[str]()
    turns = turns[:: max(1, len(turns) // 12)]
    limit = int(engine.total_tokens // 2 * share)
    for i in range(count):
        ids = turns[rng.integers(len(turns))].ids
        ids = ids[: int(rng.integers(1, len(ids) + 1))].tolist()
        name = ("pin", "retain", "next_turn", "demote", "prefetch")[rng.integers(5)]
        value: Any = True if name in ("demote", "prefetch") else float(rng.choice([0, 0.02, 1, 3600]))
        tenant = TENANTS[rng.integers(2)]
        if i % 50 == 0:
            engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 1}, tenant=tenant)
        (told,) = engine.prefixes.hint(ids, {name: value}, tenant=tenant, share=share)
        answers[told["answer"]] += 1
        most = max(most, kept(engine, tenant, share)) if i % 10 == 0 else most

    def end() -> dict[str, int]:
        machine = engine._loop.machine
        machine.pins.expire(machine.clock.now() + 100_000)
        tree = machine.scheduler.cache._inside().tree
        return {
            "pinned": machine.scheduler.cache.stats().shelves["full", rootcellar.cache.Tier.DEVICE].pinned,
            "kept": sum(limit - min(machine.pins.room(name, share), limit) for name in TENANTS),
            "expected": sum(any(due > 0 for due in node.dues) for node in walk(tree)),
        }

    left = engine._loop.call(end)
    engine.check()
    return {"hints": count, "answers": dict(answers), "most_of_a_tenant": most, "limit": limit, "left": left}


@contextlib.contextmanager
def engine_of(args: argparse.Namespace, policy: str) -> Iterator[rootcellar.Engine]:
    with rootcellar.Engine(
        model_path="demo", page_size=args.page, max_total_tokens=args.pages * args.page, max_running_requests=8,
        radix_eviction_policy=policy, log_level="error",
    ) as engine:  # fmt: skip
        engine.generate(input_ids=[[1] * 40, [2] * 400], sampling_params={"max_new_tokens": 2})
        engine.flush_cache()
        yield engine


def part(found: Found, promised: Mapping[int, int]) -> float:
    """Of what turns could hit of their turn before, as far as that was promised, what they did."""
    pairs = [(hit, min(could, promised[i])) for i, (hit, could) in found.by_turn.items() if i in promised]
    return sum(min(hit, could) for hit, could in pairs) / max(1, sum(could for _, could in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", help="requests in Mooncake's form (timestamp, input_length, hash_ids)")
    parser.add_argument("--first", type=int, default=0, help="of the trace's requests")
    parser.add_argument("--requests", type=int, default=600, help="of the trace")
    parser.add_argument("--longest", type=int, default=400, help="blocks of a prompt; more are cut")
    parser.add_argument("--speed", type=float, default=100.0, help="seconds of the sessions in one of ours")
    parser.add_argument("--gap", type=float, default=300.0, help="a turn after so many seconds is announced")
    parser.add_argument("--pages", type=int, default=0, help="of the cache (default: 1000 of a trace, 512 without)")
    parser.add_argument("--page", type=int, default=4, help="tokens of a page")
    parser.add_argument("--share", type=float, default=0.5, help="of what may be kept (half of the cache), a tenant's")
    parser.add_argument("--policy", default="adaptive", help="of the run with hints; that without is LRU")
    parser.add_argument("--random", type=int, default=10_000, help="random hints in the end")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    args.pages = args.pages or (1000 if args.trace else 512)
    if args.trace:
        turns = recorded(args.trace, args.page, args.first, args.requests, args.longest)
    else:
        turns = generated(args.page)
    with engine_of(args, args.policy) as engine:
        hinted = asyncio.run(replay(engine, turns, args, True))
        limit = int(engine.total_tokens // 2 * args.share)
        random = leaks(engine, turns, args.random, args.share)
    with engine_of(args, "lru") as engine:
        plain = asyncio.run(replay(engine, turns, args, False))
    rows = {
        "turns": len(turns),
        "answers": dict(hinted.answers),
        "counted": len(hinted.promised),
        "next_turn_hits": part(hinted, hinted.promised),
        "lru_next_turn_hits": part(plain, hinted.promised),
        "hit_rate": hinted.hit_tokens / hinted.tokens,
        "lru_hit_rate": plain.hit_tokens / plain.tokens,
        "most_kept": dict(hinted.most),
        "limit_of_a_tenant": limit,
        "seconds": hinted.seconds,
        "random": random,
    }
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{rows['turns']} turns, {rows['counted']} announced and granted, some in part ({rows['answers']})")
    print(
        f"what their turn before had was a hit: {rows['next_turn_hits']:.1%}, with LRU {rows['lru_next_turn_hits']:.1%}"
    )
    print(f"of all prompts {rows['hit_rate']:.1%}, with LRU {rows['lru_hit_rate']:.1%}")
    print(f"kept at most {rows['most_kept']} tokens of {limit} that a tenant may")
    print(f"{random['hints']} random hints: {random['answers']}")
    print(f"at most {random['most_of_a_tenant']} tokens of a tenant's kept; left in the end: {random['left']}")


if __name__ == "__main__":
    main()
