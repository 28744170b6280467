"""Everything at once: settings and requests drawn by a seed, and compared with one plain engine.

    python tests/engine/everything.py FIRST LAST [SECONDS]     # seeds; prints one line each, then what differed
    python tests/engine/everything.py timeline                 # one request's stages on two nodes

Qwen3.5 tiny: an encoder of pictures before gated delta nets and attention. There are several pages and chunks, rows and
memory (so little that requests are retracted and pages evicted), types of the KV cache, one device or two. Drawn are
tiers and a store, one node or two that meet over TCP, steps that overlap; then rounds of requests with and without
pictures, turns of conversations, tenants, and what an operator does between and beside them.

Pages, chunks, rows, memory, types, devices and whether tokens are guessed are not drawn but the same for ten seeds in a
row, as each compiles anew: engines of a process share what they compiled (``shared_programs.py``), and seeds that have
the same come after each other, whatever their numbers.

The plain engine has one page size, one chunk, one device, no tier, and answers each request alone. Greedy tokens must
be its tokens, unless its two best lay closer than ``TIE`` there; what follows a tie is not compared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from apart import two_nodes
from idle import always_load, check_idle, evict, settle
from shared_programs import shared_programs

import rootcellar
from checkpoints import make_checkpoint, picture
from rootcellar.cache import Tier
from rootcellar.errors import RequestError

TIE = {"auto": 2e-3, "int8": 0.03, "fp8_e4m3": 0.15}
"""Of log-probability, by type of the KV cache: what other shapes of a step may move a score by. Codes round anew."""
MOST = 10
"""Tokens of an answer."""
TURNS = 3
PLACE = 500
"""The token that stands for a picture."""
PICTURES = [(1, 64, 64), (2, 96, 64), (3, 64, 150), (4, 33, 200), (5, 160, 160), (6, 20, 20)]


class Conversations:
    """What is asked: conversations by number, turn by turn, and what the plain engine answers."""

    def __init__(self, folder):
        self._folder = folder
        self._engines = {}
        self._known = {}

    def close(self):
        for engine in self._engines.values():
            engine.shutdown()

    def asked(self, dtype, number, turn):
        """Ids and pictures (numbers in ``PICTURES``) of a turn: all before it with its answers, and something new."""
        ids, shown = [], []
        for n in range(turn + 1):
            rng = random.Random(f"{number}/{n}")
            if n:
                ids += self.answer(dtype, number, n - 1)[0]
            elif number % 3:  # a system prompt that many share
                ids += list(range(10, 10 + 7 * (number % 3) * 4))
            for _ in range(rng.choice([0, 1, 1, 2]) if n == 0 else rng.choice([0, 0, 1])):
                ids += [rng.randrange(480) for _ in range(rng.choice([0, 1, 9]))] + [501, PLACE, 502]
                shown.append(rng.randrange(len(PICTURES)))
            ids += [rng.randrange(480) for _ in range(rng.choice([1, 3, 17, 40]))]
        return ids, shown

    def answer(self, dtype, number, turn):
        """Tokens of the plain engine's, and for each how far its two best were apart."""
        key = dtype, number, turn
        if key not in self._known:
            ids, shown = self.asked(dtype, number, turn)
            result = self._plain(dtype).generate(
                input_ids=ids, image_data=images(shown), sampling_params=sampling(MOST), return_logprob=True,
                top_logprobs_num=2, return_text_in_logprobs=False,
            )  # fmt: skip
            best = result["meta_info"]["output_top_logprobs"]
            self._known[key] = result["output_ids"], [first[0] - second[0] for first, second in best]
        return self._known[key]

    def _plain(self, dtype):
        if dtype not in self._engines:
            self._engines[dtype] = rootcellar.Engine(
                model_path=self._folder, skip_tokenizer_init=True, max_total_tokens=2048, max_running_requests=1,
                chunked_prefill_size=256, kv_cache_dtype=dtype, disable_radix_cache=True, disable_overlap_schedule=True,
            )  # fmt: skip
        return self._engines[dtype]


def images(shown):
    return [picture(*PICTURES[i]) for i in shown] or None


def sampling(most):
    return {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}


SHAPES = [(4, 16, 2, 448), (4, 64, 4, 320), (16, 16, 2, 448), (16, 64, 4, 1024), (16, 32, 4, 320)]
"""Tokens of a page and of a chunk, rows, and tokens in all."""
ALIKE = 10
"""Seeds in a row that have one of these, one type of the KV cache, as many devices, and guess or not: all meet in 600
seeds."""


def compiled(seed):
    """The settings that a seed's number says, for which an engine compiles."""
    block = seed // ALIKE
    page, chunk, rows, total = SHAPES[block % len(SHAPES)]
    return {
        "page_size": page,
        "chunked_prefill_size": chunk,
        "max_running_requests": rows,
        "max_total_tokens": total,
        "kv_cache_dtype": list(TIE)[block % len(TIE)],
        "tp_size": 1 + block // (len(SHAPES) * len(TIE)) % 2,
        "speculative_algorithm": (None, "ngram")[block // (2 * len(SHAPES) * len(TIE)) % 2],
        "speculative_num_draft_tokens": 4,
    }


def draw(seed, rng):
    """Settings of an engine, or of two nodes."""
    drawn = compiled(seed) | {
        "disable_overlap_schedule": rng.random() < 0.5,
        "mm_cache_size": 1,
        "apart": rng.random() < 0.4,
    }
    tiers = rng.choice(["device", "host", "store", "store"])
    if drawn["apart"] or tiers != "device":
        drawn |= {"enable_hierarchical_cache": True, "hicache_ratio": rng.choice([1.5, 4.0])}
        drawn["hicache_write_policy"] = rng.choice(["write_through", "write_back", "write_through_selective"])
    if tiers == "store":
        drawn |= {
            "hicache_storage_backend": "file",
            "hicache_storage_prefetch_policy": rng.choice(["best_effort", "wait_complete", "timeout"]),
        }
    return drawn


def store(drawn, scratch, node):
    """The settings of a node's store, if it has one: a folder of its own, as one process may write it."""
    if "hicache_storage_backend" not in drawn:
        return {}
    settings = {"path": f"{scratch}/{node}", "min_free_space": 0, "prefetch_threshold": 4}
    return {"hicache_storage_backend_extra_config": json.dumps(settings)}


@contextlib.contextmanager
def started(folder, drawn, scratch):
    """The nodes, and what asks them: one engine, or two that meet."""
    options = {name: value for name, value in drawn.items() if name != "apart"}
    if drawn["apart"]:
        with two_nodes(folder, prefill=store(drawn, scratch, 0), decode=store(drawn, scratch, 1), **options) as pair:
            yield [pair.prefill, pair.decode], pair
            pair.check_idle()
        return
    options |= {"skip_tokenizer_init": True, **store(drawn, scratch, 0)}
    with always_load(rootcellar.Engine(model_path=folder, **options)) as engine:
        yield [engine], None
        check_idle(engine)


class Round:
    """A few requests at once, each in a thread of its own."""

    def __init__(self, rng, conversations, drawn, nodes, pair):
        self._rng, self._talks, self._drawn, self._nodes, self._pair = rng, conversations, drawn, nodes, pair
        self.wrong = []
        self.ties = self.compared = self.refused = 0

    def run(self):
        dtype = self._drawn["kv_cache_dtype"]
        chosen = [(self._rng.randrange(12), self._rng.randrange(TURNS)) for _ in range(self._rng.randint(1, 5))]
        for talk in chosen:
            self._talks.answer(dtype, *talk)  # before anything runs beside it
        threads = [threading.Thread(target=self._ask, args=(*talk, self._rng.choice("ab"))) for talk in chosen]
        for thread in threads:
            thread.start()
        if self._rng.random() < 0.3:
            self._disturb()
        for thread in threads:
            thread.join(120)
            if thread.is_alive():
                raise TimeoutError("a request hangs")
        self._between()

    def _ask(self, number, turn, tenant):
        dtype = self._drawn["kv_cache_dtype"]
        (ids, shown), (tokens, gaps) = self._talks.asked(dtype, number, turn), self._talks.answer(dtype, number, turn)
        try:
            if self._pair is not None:
                result = self._pair.ask(ids, MOST, image_data=images(shown), tenant=tenant)
            else:
                result = self._nodes[0].generate(
                    input_ids=ids, image_data=images(shown), sampling_params=sampling(MOST), tenant=tenant,
                    raise_on_failure=False,
                )  # fmt: skip
        except RequestError as error:
            if "max_total_tokens" not in str(error):
                self.wrong.append(f"conversation {number}, turn {turn}: {error}")
            self.refused += 1
            return
        if result["meta_info"]["finish_reason"]["type"] == "abort":
            self.wrong.append(f"conversation {number}, turn {turn}: {result['meta_info']['finish_reason']}")
            return
        for at, (found, wanted, gap) in enumerate(zip(result["output_ids"], tokens, gaps, strict=True)):
            if found != wanted:
                if gap > TIE[dtype]:
                    said = f"token {at} is {found}, not {wanted}, and the two best are {gap:.4f} apart"
                    self.wrong.append(f"conversation {number}, turn {turn}: {said}; {result['meta_info']}")
                self.ties += gap <= TIE[dtype]
                return
            self.compared += 1

    def _disturb(self):
        """What happens while requests run."""
        time.sleep(self._rng.random() * 0.3)
        for node in self._nodes:
            if self._pair is None and self._rng.random() < 0.5:
                node.pause_generation("retract")
                node.continue_generation()

    def _between(self):
        """What happens between rounds."""
        for node in self._nodes:
            what = self._rng.choice(["nothing", "nothing", "flush", "evict", "forget"])
            settle(node)
            node.check()
            if what == "flush":
                node.flush_cache()
            elif what == "evict":
                evict(node, Tier.DEVICE)
            elif what == "forget":
                node._loop.call(node._loop.machine.life.encodings.forget)


def configuration(seed, folder, conversations):
    """One configuration: what it was, and what it found."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        drawn = draw(seed, rng)
        found = {"wrong": [], "ties": 0, "compared": 0, "refused": 0}
        with started(folder, drawn, scratch) as (nodes, pair):
            for _ in range(rng.randint(2, 4)):
                one = Round(rng, conversations, drawn, nodes, pair)
                one.run()
                for name in found:
                    found[name] += getattr(one, name)
            found["retracted"] = sum(node.stats()["retractions"] for node in nodes)
    return drawn, found


def tried(seed, folder, conversations):
    """The same, where a leak that ``check()`` found, or a hang, is something wrong: it is said with its seed."""
    try:
        return configuration(seed, folder, conversations)
    except Exception as error:
        return {}, {"wrong": [f"{type(error).__name__}: {error}"]}


def main(first, last, seconds):
    began = time.monotonic()
    totals, wrong, done = {}, [], []
    alike = {seed: repr(compiled(seed)) for seed in range(first, last)}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint("qwen3-5", folder, seed=0)
        conversations = Conversations(folder)
        for _, seeds in itertools.groupby(sorted(alike, key=alike.get), key=alike.get):
            with shared_programs():
                for seed in seeds:
                    if time.monotonic() - began > seconds:
                        break
                    at = time.monotonic()
                    drawn, found = tried(seed, folder, conversations)
                    done.append(seed)
                    wrong += [f"seed {seed}: {each}" for each in found["wrong"]]
                    for name, value in found.items():
                        totals[name] = totals.get(name, 0) + (len(value) if name == "wrong" else value)
                    print(f"seed {seed}: {time.monotonic() - at:.1f} s {found} {drawn}", flush=True)
        conversations.close()
    print(f"{len(done)} configurations, of seeds {first} to {last - 1}: {totals}")
    for each in wrong:
        print(each)
    return bool(wrong)


def timeline():
    """A conversation's second turn on two nodes, with everything on: when either node did what, as a table."""
    drawn = {"page_size": 4, "chunked_prefill_size": 16, "kv_cache_dtype": "fp8_e4m3", "apart": True}
    drawn |= {"hicache_storage_backend": "file", "hicache_storage_prefetch_policy": "wait_complete"}
    random_ids = random.Random(7).choices(range(480), k=100)
    first = [*random_ids[:20], 501, PLACE, 502, *random_ids[20:40]]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
        make_checkpoint("qwen3-5", folder, seed=0)
        with started(folder, drawn, scratch) as (nodes, pair):
            for salt in ("compiles", "told of"):
                shown = images([4])
                answer = pair.ask(first, MOST, image_data=shown, cache_salt=salt)["output_ids"]
                second = [*first, *answer, *random_ids[40:90], 501, PLACE, 502, *random_ids[90:]]
                shown += images([1])
                given = pair.ask_both(second, MOST, image_data=shown, cache_salt=salt)
            encoded = [node.stats()["encoder"]["encoded"] for node in nodes]
            sent = nodes[0].stats()["disaggregation"]
    print("| ms | prefill node | decode node |\n|---|---|---|")
    rows = [(at, node, name) for node, each in enumerate(given) for name, at in each["meta_info"]["stages"]]
    for at, node, name in sorted(rows):
        print(f"| {1000 * at:.0f} | {'' if node else name} | {name if node else ''} |")
    for each in given:
        print(
            {name: each["meta_info"].get(name) for name in ("prompt_tokens", "cached_tokens_details", "image_tokens")}
        )
    print(f"encoded: {encoded}, sent in all: {sent['pages']} pages, {sent['bytes']} bytes")


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    if sys.argv[1] == "timeline":
        sys.exit(timeline())
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else float("inf")))
