"""The price in seconds that a miss is explained with, beside what recomputing took: is it within 10 %?

    .venv/bin/python benchmarks/price.py --model-path MODEL

Prompts of several lengths are asked for, asked for again with another end (hits, a few of them), lost, asked for once
more, and hit again: no machine is as fast all the time. What the miss took longer than the hits' median, by the
caller's clock, is what recomputing took; the explanation's price is read back by the request's name. They are lost in
four ways: a flush, another salt, a value that changed in the middle (so that only the second half is computed again, at
its depth), and eviction by other prompts. What follows the prompt is short, or as long as the prompt, of which nothing
was known before: that is in no price. There two long times are subtracted, and each is as uncertain as the price.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

import rootcellar

LOSSES = "flush", "salt", "value", "evicted"
VALUE = 4


class Asker:
    """Asks an engine for one token at a time, and says how long that took."""

    def __init__(self, engine: rootcellar.Engine, seed: int) -> None:
        self.engine = engine
        self.count = 0
        self._random = np.random.default_rng(seed)

    def tokens(self, count: int) -> list[int]:
        """Tokens that nobody asked for before."""
        return [int(each) for each in self._random.integers(100, 900, count)]

    def ask(self, ids: list[int], **options: Any) -> tuple[float, int, str]:
        """Seconds, tokens that were cached, and the request's name."""
        self.count += 1
        rid = f"price-{self.count}"
        params = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}
        began = time.perf_counter()
        result = self.engine.generate(input_ids=ids, sampling_params=params, rid=rid, **options)
        return time.perf_counter() - began, result["meta_info"]["cached_tokens"], rid


def measure(asker: Asker, loss: str, length: int, tail: int, hits: int) -> dict[str, Any]:
    """One miss of a prompt of ``length`` tokens, with ``tail`` tokens behind it that are new each time."""
    prompt = asker.tokens(length)
    asker.ask(prompt)
    hit, cached = [], 0
    for _ in range(hits):
        seconds, cached, _ = asker.ask([*prompt, *asker.tokens(tail)])
        hit.append(seconds)
    options: dict[str, Any] = {}
    if loss == "flush":
        asker.engine.flush_cache()
    elif loss == "salt":
        options = {"cache_salt": str(asker.count)}
    elif loss == "value":
        at = length // 2
        prompt = [*prompt[:at], *asker.tokens(VALUE), *prompt[at + VALUE :]]
    else:
        for _ in range(1 + asker.engine.stats()["cache"]["full"]["DEVICE"]["size"] // (length + tail)):
            asker.ask(asker.tokens(length + tail))
    seconds, left, rid = asker.ask([*prompt, *asker.tokens(tail)], **options)
    told = asker.engine.prefixes.explained(rid)
    assert told is not None
    hit += [asker.ask([*prompt, *asker.tokens(tail)], **options)[0] for _ in range(hits)]
    measured = seconds - median(hit)
    return {
        "loss": loss,
        "prompt": length,
        "tail": tail,
        "cause": told["cause"],
        "from": left,
        "tokens": told["price_tokens"],
        "exact": told["price_tokens"] == cached - left,
        "price": told["price_seconds"],
        "measured": measured,
        "ratio": told["price_seconds"] / measured,
    }


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="demo")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--tail", type=int, default=32, help="tokens behind a prompt; as many as it has come too")
    parser.add_argument("--rounds", type=int, default=2, help="misses of each kind")
    parser.add_argument("--hits", type=int, default=3, help="of each prompt, before it is lost and after")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--tokens", type=int, default=8192, help="that the cache holds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with rootcellar.Engine(
        model_path=args.model_path, max_total_tokens=args.tokens, max_running_requests=4, log_level="error"
    ) as engine:
        rows = run(Asker(engine, args.seed), args, (lambda _: None) if args.json else partial(print, flush=True))
        engine.flush_cache()
        engine.check()
    if args.json:
        print(json.dumps(rows, indent=1))


def run(asker: Asker, args: argparse.Namespace, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """All of them, and what they come to."""
    for length in (16, 64, args.tail, *args.lengths, 2 * args.lengths[0]):  # shapes compile, and efforts are learnt
        asker.ask(asker.tokens(length))
        asker.ask(asker.tokens(length + args.tail))
    say(f"{'loss':8} prompt  tail {'cause':16}  from tokens     price  measured ratio")
    rows = []
    for _, length, loss in itertools.product(range(args.rounds), args.lengths, args.losses):
        for tail in (args.tail, length):
            if loss == "evicted" and tail == length:
                continue  # which of the two was evicted is no matter of the tail
            rows.append(row := measure(asker, loss, length, tail, args.hits))
            times = f"{row['price']:7.3f} s {row['measured']:7.3f} s {row['ratio']:.3f}"
            say(f"{loss:8} {length:6} {tail:5} {row['cause']:16} {row['from']:5} {row['tokens']:6} {times}")
    for short in (True, False):
        own = [row["ratio"] for row in rows if (row["tail"] == args.tail) == short]
        if own:
            near, kind = sum(abs(each - 1) <= 0.1 for each in own), "short" if short else "long"
            say(f"{kind} tails: {len(own)}, price / measured {min(own):.3f} to {max(own):.3f}, within 10 % {near}")
    off = sorted(abs(row["ratio"] - 1) for row in rows)
    say(
        f"{len(rows)} misses, prices in tokens exact {sum(row['exact'] for row in rows)}; price / measured: median "
        f"{median(row['ratio'] for row in rows):.3f}, off by {median(off):.1%} in the median, by {off[-1]:.1%} at "
        f"most, within 10 % {sum(each <= 0.1 for each in off)}"
    )
    return rows


if __name__ == "__main__":
    main()
