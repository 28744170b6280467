"""The simulator: traces, the offline optimum, the command."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from pathlib import Path

import pytest

from checkpoints import make_config
from rootcellar.cache import Tier
from rootcellar.cli import main
from rootcellar.commands import figure
from rootcellar.errors import ConfigError
from rootcellar.sim.azure import parse_csv
from rootcellar.sim.replay import Outcome, _awaited, optimal, replay
from rootcellar.sim.trace import TraceRequest, parse
from rootcellar.sim.workloads import WORKLOADS, agents, workload

TRACE = os.environ.get("ROOTCELLAR_TRACE")
needs_trace = pytest.mark.skipif(
    not TRACE, reason="ROOTCELLAR_TRACE does not name the Mooncake conversation trace (FAST25-release/traces)"
)


def requests(*prompts: list[int], block: int = 4) -> list[TraceRequest]:
    return [TraceRequest(tuple(ids), len(ids) * block) for ids in prompts]


def test_bad_lines_are_reported_with_their_number_and_the_rest_is_read():
    good = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
    lines = [
        json.dumps(good),
        "not json",
        "",
        json.dumps(good | {"hash_ids": [0]}),
        json.dumps({"input_length": 3}),
        json.dumps(good | {"input_length": 0}),
        json.dumps(good | {"hash_ids": [0, "x"]}),
        "[1]",
        json.dumps(good),
    ]
    read, bad = parse(lines)
    assert len(read) == 2
    assert [line.line for line in bad] == [2, 4, 5, 6, 7, 8]
    assert "2 blocks of 512, hash_ids has 1" in bad[1].reason
    assert "lacks 'hash_ids'" in bad[2].reason
    assert "not an object" in bad[5].reason


def test_ids_of_any_size_are_told_apart_and_lengths_may_be_written_as_floats():
    """Some traces have hashes of 64 bits, and some tools write whole numbers with a point."""
    large = [2**53, 2**53 + 1, 2**64 - 1, -5]
    lines = [
        json.dumps({"input_length": 2048, "hash_ids": large}),
        json.dumps({"input_length": 1200.0, "output_length": 3.0, "hash_ids": [*large[:2], 7.0]}),
    ]
    (first, second), bad = parse(lines)
    assert not bad
    assert second.input_length == 1200
    assert isinstance(second.input_length, int)
    assert second.output_length == 3
    assert len(set(first.hash_ids)) == 4
    assert second.hash_ids[:2] == first.hash_ids[:2]
    assert second.hash_ids[2] not in first.hash_ids
    assert (first.key().tokens >= 0).all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_length": 600.5}, r"input_length is 600\.5, not a whole number"),
        ({"input_length": "600"}, "input_length is '600', not a whole number"),
        ({"input_length": True}, "input_length is True, not a whole number"),
        ({"input_length": -1}, "input_length is -1: a number of tokens is from 1"),
        ({"output_length": 10**30}, "a number of tokens is from 0 to 2147483647"),
        ({"output_length": math.nan}, "output_length is nan, not a whole number"),
        ({"hash_ids": [1, 1e300]}, r"hash_ids\[1\] is 1e\+300, not a whole number"),
        ({"hash_ids": [1, None]}, r"hash_ids\[1\] is None"),
        ({"hash_ids": 3}, "hash_ids is 3, not a list"),
    ],
)
def test_the_reason_of_a_bad_line_is_the_true_one(changes, reason):
    read, (bad,) = parse([json.dumps({"input_length": 600, "hash_ids": [0, 1], **changes})])
    assert not read
    assert re.search(reason, bad.reason), bad.reason


def test_block_ids_become_tokens_that_depend_on_the_id_alone():
    key = TraceRequest((7, 3), 6).key(block=4)
    assert key.tokens.tolist() == [28, 29, 30, 31, 12, 13]


def test_replay_counts_what_the_cache_hits():
    outcome = replay(requests([0, 1], [0, 1, 2], [5], [0, 1, 2]), capacity=64, page_size=4, block=4)
    assert (outcome.input_tokens, outcome.hit_tokens, outcome.evicted_tokens) == (36, 20, 0)
    assert outcome.hit_rate == pytest.approx(20 / 36)


def test_replay_pins_what_runs_and_refuses_what_never_fits():
    prompts = requests([0, 1], [2, 3], [0, 1], [9, 10, 11, 12, 13])
    alone = replay(prompts, capacity=16, page_size=4, block=4)
    assert (alone.hit_tokens, alone.refused) == (8, 1)
    crowded = replay(prompts, capacity=8, page_size=4, concurrency=4, block=4)
    assert (crowded.hit_tokens, crowded.refused) == (0, 1)


def test_outputs_take_room():
    prompts = requests([0, 1], [2, 3], [0, 1])
    assert replay(prompts, capacity=16, page_size=4, block=4).hit_tokens == 8
    assert replay(prompts, capacity=16, page_size=4, output_tokens=8, block=4).hit_tokens == 0


def test_the_optimum_is_the_best_of_all_choices():
    """Against exhaustive search: every set of at most three blocks that keeps prefixes whole, at every step."""
    prompts = requests([0], [1], [2, 3], [0], [4], [2, 3], [1], [0], [2])
    parent = {3: 2}

    def best(i: int, cached: frozenset[int]) -> int:
        if i == len(prompts):
            return 0
        ids = prompts[i].hash_ids
        hit = len(list(itertools.takewhile(lambda b: b in cached, ids)))
        held = cached | set(ids)
        keeps = [frozenset(k) for n in range(4) for k in itertools.combinations(sorted(held), n)]
        return 4 * hit + max(best(i + 1, k) for k in keeps if all(parent.get(b, b) in k for b in k))

    assert optimal(prompts, capacity=12, block=4).hit_tokens == best(0, frozenset())


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru", "mru", "adaptive"])
def test_no_policy_beats_the_optimum(policy):
    trace = agents(400, seed=3)
    assert replay(trace, capacity=60_000, policy=policy).hit_rate <= optimal(trace, capacity=60_000).hit_rate


def test_generated_traces_are_the_same_every_time():
    for name in WORKLOADS:
        assert workload(name)[:50] == workload(name)[:50]
    with pytest.raises(ConfigError, match="agents"):
        workload("nothing")


def test_the_figure_has_a_line_per_policy_and_both_scales():
    outcomes = [
        Outcome(p, c, 64, 100, h, 0) for p, c, h in (("lru", 10**6, 10), ("lru", 10**7, 40), ("optimal", 10**6, 50))
    ]
    page = figure.to_html(outcomes, "A <trace>", token_bytes=36_864)
    assert page.count("<polyline") == 2
    assert "A &lt;trace&gt;" in page
    assert "36.9 GB" in page
    assert "1,843 GB" in figure.to_html([Outcome("lru", 50 * 10**6, 64, 100, 10, 0)], "large", token_bytes=36_864)
    assert "10.00 %" in page
    assert figure.curves(outcomes)["lru"] == [(10**6, 0.9), (10**7, 0.6)]


class TestCommand:
    @pytest.fixture
    def trace(self, tmp_path) -> Path:
        path = tmp_path / "trace.jsonl"
        lines = [json.dumps({"input_length": 1024, "hash_ids": [i % 3, i % 3 + 10]}) for i in range(9)]
        path.write_text("\n".join([*lines, "oops"]))
        return path

    def test_the_command_says_what_each_tier_gave(self, trace, capsys):
        assert (
            main(
                [
                    "replay",
                    str(trace),
                    "--capacity",
                    "2k",
                    "--policy",
                    "lru",
                    "--host",
                    "4k",
                    "--storage",
                    "1M",
                    "--json",
                ]
            )
            == 0
        )
        first = json.loads(capsys.readouterr().out)["results"][0]
        assert sum(first["hit_tokens_by_tier"].values()) == first["hit_tokens"]
        assert main(["replay", str(trace), "--storage", "1M"]) == 2
        assert "--storage is behind --host" in capsys.readouterr().err

    def test_json(self, trace, capsys):
        assert main(["replay", str(trace), "--capacity", "2k,1M", "--policy", "lru,adaptive", "--json"]) == 0
        out, err = capsys.readouterr()
        answer = json.loads(out)
        assert answer["trace"] == str(trace)
        assert answer["skipped"][0]["line"] == 10
        assert f"{trace}:10: skipped" in err
        rows = {(row["policy"], row["capacity_tokens"]): row for row in answer["results"]}
        assert {policy for policy, _ in rows} == {"lru", "adaptive", "optimal"}
        assert rows["lru", 1_000_000]["hit_rate"] == pytest.approx(6 / 9)
        assert rows["optimal", 2000]["hit_rate"] > rows["lru", 2000]["hit_rate"] == 0
        assert set(rows["lru", 2000]) >= {"page_size", "hit_tokens", "input_tokens", "evicted_tokens", "seconds"}

    @pytest.mark.parametrize("name", ["curve.html", "curve.svg", "curve.png"])
    def test_figure_and_table(self, trace, tmp_path, capsys, name):
        if name.endswith("png"):
            pytest.importorskip("matplotlib")
        config = tmp_path / "config.json"
        config.write_text(json.dumps(make_config("qwen2")))
        arguments = ["--figure", str(tmp_path / name), "--model-config", str(config), "--output-tokens", "trace"]
        assert main(["replay", str(trace), "--capacity", "4k", *arguments]) == 0
        assert (tmp_path / name).stat().st_size > 1000
        assert "optimal" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--capacity", "1x"], "'1x' is not a number of tokens"),
            (["--policy", "best"], "adaptive"),
            (["--page-size", "0"], "--page-size is 0"),
            (["--figure", "a.gif"], ".html, .svg or .png"),
            (["--model-config", "/nowhere"], "/nowhere"),
        ],
    )
    def test_wrong_options_are_named(self, trace, capsys, arguments, named):
        assert main(["replay", str(trace), *arguments]) == 2
        assert named in capsys.readouterr().err

    def test_a_trace_that_cannot_be_used_is_named(self, tmp_path, capsys):
        assert main(["replay", str(tmp_path / "none")]) == 2
        assert "cannot be read" in capsys.readouterr().err
        (tmp_path / "empty").write_text("oops\n")
        assert main(["replay", str(tmp_path / "empty")]) == 2
        assert "line 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def conversation() -> list[TraceRequest]:
    with open(TRACE, encoding="utf-8") as lines:
        read, bad = parse(lines)
    assert len(read) == 12_031
    assert not bad
    return read


@needs_trace
class TestConversationTrace:
    """Known results on the whole trace, in percent, at 512-token blocks."""

    @pytest.mark.parametrize(("millions", "known"), [(1, 5.6), (2, 8.9), (3, 14.4), (10, 29.8)])
    def test_lru(self, conversation, millions, known):
        assert 100 * replay(conversation, capacity=millions * 10**6, page_size=512).hit_rate == pytest.approx(
            known, abs=1
        )

    @pytest.mark.parametrize(("millions", "known"), [(1, 25.8), (2, 32.7), (3, 36.0), (10, 37.3)])
    def test_optimal(self, conversation, millions, known):
        assert 100 * optimal(conversation, capacity=millions * 10**6).hit_rate == pytest.approx(known, abs=1)

    @pytest.mark.parametrize(("millions", "best_fixed"), [(1, 10.2), (2, 15.2), (3, 18.3), (5, 22.3), (10, 29.1)])
    def test_adaptive_is_above_the_best_fixed_policy_even_if_that_remembers_every_block(
        self, conversation, millions, best_fixed
    ):
        """The numbers are those of LFU and SLRU that count uses of blocks long evicted, and of LRU at 10M."""
        rate = 100 * replay(conversation, capacity=millions * 10**6, policy="adaptive").hit_rate
        assert rate > best_fixed


# -- more of a trace -----------------------------------------------------------------------------------------------


def test_shares_of_several_traces_gaps_and_what_a_gigabyte_gains(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(make_config("qwen2")))
    lines = [{"timestamp": 1000 * i, "input_length": 1024, "hash_ids": [i % 3, 10 + i % 3]} for i in range(9)]
    (tmp_path / "trace").write_text("\n".join(map(json.dumps, lines)))
    traces = [str(tmp_path / "trace"), "generated:agents"]
    options = ["--capacity", "2k", "--policy", "mru", "--limit", "200", "--model-config", str(config), "--json"]
    assert main(["replay", *traces, *options]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["gaps"] == {"turns": 6, "tokens": [2048] * 4, "seconds": [3.0] * 4}
    mru, best = first["results"]
    assert (mru["policy"], best["policy"]) == ("mru", "optimal")
    assert best["share_of_distance"] == 1
    assert mru["share_of_distance"] == pytest.approx(mru["hit_rate"] / best["hit_rate"]), "LRU hits nothing here"
    assert mru["gained_by_1_gb"] > 0
    assert second["requests"] == 200
    assert main(["replay", *traces, *options[:-1]]) == 0
    printed = capsys.readouterr().out
    assert "6 go on with an earlier one" in printed
    assert "+1 GB" in printed


def test_ids_are_made_of_azures_lengths():
    """The second goes on with the first (100 + 20 tokens and a message of 30), the third with nobody."""
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.9799600,100,20",
            "2023-11-16 18:17:05.0000000,150,9", "2023-11-16 18:18:05.0,9000,9", "nonsense,1,2"]  # fmt: skip
    (first, second, third), (bad,) = parse_csv(rows, block=16, most=64)
    assert bad.line == 5
    assert second.timestamp - first.timestamp == pytest.approx(1020.04, abs=0.1)
    assert second.whole(16).tokens[:112].tolist() == first.whole(16).tokens[:112].tolist()
    assert not set(third.hash_ids) & set(second.hash_ids + second.output_ids)
    assert replay([first, second, third], capacity=1 << 20, page_size=16, block=16).hit_tokens == 112
    assert replay(parse_csv(rows, block=16, most=16)[0], capacity=1 << 20, page_size=16, block=16).hit_tokens == 0
    with pytest.raises(ValueError, match="ContextTokens"):
        parse_csv(["a,b", "1,2"])
    # Ids are made for each block: a number that nobody means would take all memory.
    _, bad = parse_csv([rows[0], f"{rows[1]}{'0' * 30}", rows[1].replace(",100,", ",0,")], block=16)
    assert [line.line for line in bad] == [2, 3]
    assert all("a number of tokens is from" in line.reason for line in bad)
    with pytest.raises(ValueError, match="no CSV"):
        parse_csv([rows[0], "x" * 200_000])


def test_answers_whose_ids_are_known_are_cached_and_times_make_the_order():
    lines = [
        {"timestamp": 5, "input_length": 12, "output_length": 3, "hash_ids": [1, 2, 3]},
        {"timestamp": 1, "input_length": 6, "output_length": 5, "hash_ids": [1, 9], "output_hash_ids": [2, 8]},
        {"timestamp": 1, "input_length": 6, "output_length": 5, "hash_ids": [1, 9], "output_hash_ids": [2]},
    ]
    (first, second), (bad,) = parse(map(json.dumps, lines), block=4)
    assert "output_hash_ids" in bad.reason
    assert (first.timestamp, second.timestamp) == (1, 5)
    assert len(first.whole(4).tokens) == 10
    assert replay([first, second], capacity=64, page_size=4, block=4).hit_tokens == 8


def test_with_tiers_each_gives_what_the_nearer_ones_no_longer_have():
    """Eight prompts in turns: the device holds two of them, the host four, a store all."""
    turns = requests(*([i, 100 + i] for i in [*range(8)] * 3))
    sizes = {"capacity": 16, "page_size": 4}
    alone = replay(turns, **sizes)
    host = replay(turns, **sizes, farther={Tier.HOST: 32})
    stored = replay(turns, **sizes, farther={Tier.HOST: 32, Tier.STORAGE: 64})
    assert (alone.hit_tokens, alone.by_tier) == (0, {})
    assert (host.hit_tokens, sum(host.by_tier.values())) == (0, 0)  # of four in turns one that holds fewer has none
    assert stored.hit_tokens == 2 * 8 * 8 == stored.by_tier[Tier.STORAGE]
    again = replay(requests([1, 2], [1, 2], [3, 4], [5, 6], [1, 2], [7, 8], [9, 10], [11, 12], [1, 2]), **sizes,
                   farther={Tier.HOST: 24, Tier.STORAGE: 200})  # fmt: skip
    assert again.by_tier == {Tier.DEVICE: 8, Tier.HOST: 8, Tier.STORAGE: 8}
    assert again.hit_tokens == 24


def test_no_tiers_and_no_answers_beat_the_optimum(tmp_path, capsys):
    """Which has all their room, and what answers left."""
    turns = requests(*[[10 * who + i for i in range(3)] for who in range(4)] * 3)
    lines = [json.dumps({"input_length": r.input_length, "hash_ids": r.hash_ids}) for r in turns]
    trace = tmp_path / "turns.jsonl"
    trace.write_text("\n".join(lines))
    words = ["--capacity", "16", "--host", "40", "--storage", "60", "--policy", "lru", "--block-size", "4"]
    assert main(["replay", str(trace), *words, "--page-size", "4", "--json"]) == 0
    lru, best = json.loads(capsys.readouterr().out)["results"]
    assert (lru["hit_tokens"], best["hit_tokens"], best["capacity_tokens"]) == (96, 96, 16)
    talk = [
        TraceRequest((1, 2, 9), 10, 7, (3, 4)),  # ten tokens and six of the answer's: two blocks
        TraceRequest((1, 2, 3, 4, 5), 20),
    ]
    assert replay(talk, capacity=64, page_size=4, block=4).hit_tokens == 16
    assert optimal(talk, capacity=64, block=4).hit_tokens == 16
    assert optimal(talk, capacity=12, block=4).hit_tokens == 12


def test_requests_that_wait_keep_what_they_will_find():
    """A scan that no policy is good at, unless it knows who waits: then nearly all of the room is of use."""
    scan = requests(*[[i, 100 + i] for i in range(8)] * 6)
    hits = [
        replay(scan, capacity=40, page_size=4, block=4, policy=policy, queued=queued).hit_tokens
        for policy in ("lru", "adaptive")
        for queued in (0, 8)
    ]
    assert hits == [0, 192, 0, 192]
    assert optimal(scan, capacity=40, block=4).hit_tokens == 200  # it need not keep what runs


def test_nobody_can_send_a_turn_before_the_answer():
    """A request that goes on from one that waits or runs is not known to wait; the same prompt, or another, may be."""
    trace = requests([1, 2], [1, 2, 3], [1, 2], [1, 4], [1, 2, 3, 5], [7], [1, 2, 3])
    assert _awaited(trace, 4) == [-1, 0, -1, -1, 2, -1, 2]
    assert _awaited(requests([1, 2], [1], [1, 3], [1], [1, 2, 4]), 4) == [-1, -1, -1, -1, 0]
