"""The benchmarks run, and what the engine's defaults rest on holds here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import make_checkpoint
from rootcellar.ops import kernels

ROOT = Path(__file__).parents[1]


def measured(script, *words, timeout=240):
    """What a benchmark says as JSON."""
    return json.loads(said(script, *words, timeout=timeout))


def lines(script, *words):
    """What one says of each row, in lines of JSON."""
    return [json.loads(line) for line in said(script, *words, timeout=600).splitlines()]


def said(script, *words, timeout):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cache_benchmark_measures_every_row():
    words = ["--quick", "--pages", "16", "--rounds", "1", "--seconds", "0.01", "--sides", "rootcellar python"]
    rows = measured("cache_core.py", *words, "--groups", "micro,scaling")["rows"]
    assert {row["row"] for row in rows} >= {"decode 256 requests", "memcpy of its slots"}
    for row in rows:
        (found,) = row["sides"].values()
        assert found["median"] > 0, row


def test_the_file_store_is_measured_beside_its_medium(tmp_path):
    words = ["--mib", "4", "--rounds", "1", "--path", str(tmp_path)]
    rows = measured("file_store.py", *words)
    assert {row["way"] for row in rows} == {"buffered", "fdatasync", "direct"}
    assert all(row[name] > 0 for row in rows for name in ("memcpy", "write", "dd", "put", "read", "get"))


@pytest.mark.long
def test_engines_are_measured_side_by_side(tmp_path):
    make_checkpoint("llama2", tmp_path)
    words = ["--engine", f"rootcellar:bfloat16={sys.executable}", "--prefill", "32", "--batch", "2", "--context", "16"]
    words += ["--steps", "2", "--rounds", "1", "--long", "64"]
    found = measured("engines.py", str(tmp_path), *words, timeout=600)
    assert found["bandwidth"] > 0
    assert len(found["rows"]) == 4
    assert all(row["rootcellar"] > 0 and row["rootcellar bfloat16"] > 0 for row in found["rows"])


@pytest.mark.long
def test_hits_on_each_tier_are_measured_beside_each_other_and_a_slow_store():
    words = ["--requests", "--rounds", "1", "--tokens", "300", "--layers", "1"]
    found = measured("tiers.py", *words)["requests"]
    assert found["over_device"].keys() == {"cold", "storage", "device", "host"}
    assert found["hits"]["cold"] == found["hits"]["device"] == 1
    tried, weighed = (found["throttled"]["decisions"][name][0] for name in ("tried", "weighed"))
    assert tried["load"]
    assert tried["load_seconds"] is None  # another store was measured before
    assert weighed["load"] == (weighed["load_seconds"] <= weighed["compute_seconds"])


@pytest.mark.long
def test_tiers_are_measured_under_load():
    words = ["--layers", "1", "--rounds", "1", "--batch", "2", "--steps", "8", "--length", "64"]
    words += ["--count", "4", "--turns", "2", "--clients", "2"]
    found = measured("tiers_load.py", *words)
    assert found["decode"]["ratio"] > 0
    assert found["decode"]["bytes"]["device-host"] > 0
    rows = found["conversations"]["rows"]
    assert rows.keys() == {"none", "host", "host + file"}
    assert all(row["first_token_seconds"] > 0 and 0 <= row["cached"] < 1 for row in rows.values())


@pytest.mark.long
def test_hybrid_layouts_are_measured_with_every_tier_and_planned_for():
    words = ["--shapes", "gemma3", "--memory", "32MB", "--rounds", "1", "--answer", "4", "--plan"]
    found = measured("hybrid_tiers.py", *words, timeout=600)
    assert len(found["measured"]) == 6
    for row in found["measured"]:
        assert row["longest"] == row["planned"]
        assert (row["cached_when_back"] > 0) == (row["tiers"] != "none")
    assert {(row["machine"], row["length"]) for row in found["planned"]} >= {("8xH200", 10_000_000)}


@pytest.mark.skipif(kernels.built() is None, reason="no native attention here")
def test_what_auto_takes_is_not_the_slow_one():
    """The native kernel over XLA, in turns: from 2 to 6 times as fast; vectors wider than registers gave 0.2 to 0.3."""
    command = [sys.executable, str(ROOT / "benchmarks" / "attention_backends.py"), "--quick", "--json", "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.stdout, done.stderr
    ratios = {row["shape"]: row["ratio"] for row in json.loads(done.stdout)}
    assert ratios.keys() == {"decode 1", "decode 4", "decode 16", "prefill 64", "prefill 512"}
    assert ratios["prefill 512"] > 0.7, ratios


@pytest.mark.long
def test_a_colocated_step_holds_what_is_known_of_each_phase():
    found = measured("colocated_step.py", "--tokens", "512", timeout=900)
    assert all(found["known"].values()), found["known"]
    assert len(found["phases"]) == 7


@pytest.mark.long
def test_what_hints_keep_is_measured_live_and_nothing_is_left_of_them():
    found = measured("hints.py", "--speed", "300", "--random", "1000", timeout=600)
    assert found["counted"] > 20
    assert found["next_turn_hits"] > 0.95
    assert found["lru_next_turn_hits"] < 0.5
    assert max(found["most_kept"].values()) <= found["limit_of_a_tenant"]
    assert found["random"]["most_of_a_tenant"] <= found["random"]["limit"]
    assert found["random"]["left"] == {"pinned": 0, "kept": 0, "expected": 0}


@pytest.mark.long
def test_prices_are_measured_beside_what_recomputing_takes():
    words = ["--lengths", "64", "128", "--rounds", "1", "--hits", "1", "--tokens", "1024"]
    rows = measured("price.py", *words)
    assert len(rows) == 14
    assert all(row["exact"] and row["price"] > 0 for row in rows)
    assert {row["cause"] for row in rows} == {"forgotten", "other_namespace", "changing_value", "evicted"}


@pytest.mark.long
def test_prefill_and_decode_apart_are_measured_beside_one_engine():
    words = ["--layers", "1", "--rounds", "1", "--seconds", "6", "--streams", "2", "--steps", "8", "--length", "200"]
    words += ["--every", "2", "--at-once", "1", "--quick"]
    found = measured("disaggregation.py", *words)
    assert found["ratio_p99"] > 0
    assert all(row["long_prompts"] > 0 for row in found["systems"].values())


@pytest.mark.long
def test_caches_of_few_bits_are_measured_on_a_model(tmp_path):
    make_checkpoint("llama2", tmp_path / "model", tokenizer=True, vocab_size=300)
    words, kept = ["--model-path", str(tmp_path / "model")], ["--kept", str(tmp_path / "kept")]
    types = ["--types", "int8,fp8_e4m3 one scale,fp8_e4m3 one scale calibrated"]
    text = ["--tokens", "96", "--context", "64", *types, *kept]
    rows = lines("quantised_kv.py", *words, *text)
    assert [row["type"] for row in rows] == ["float32", *types[1].split(",")]
    assert rows[0]["kl"] == 0
    assert all(row["kl"] > 0 for row in rows[1:])
    assert (tmp_path / "kept").read_text().count("\n") == 2 * 4
    assert lines("quantised_kv.py", *words, *text) == rows  # of what was kept
    found = lines("quantised_kv.py", *words, "--needles", "--contexts", "1500", "--haystacks", "1", *types)
    assert all(row["of"] == 16 and row["logprob"] < 0 for row in found)
    sped = lines("quantised_kv.py", *words, "--speed", "--contexts", "20", "--batch", "1,2", "--rounds", "1")
    assert len(sped) == 2 * 6
    assert all(row["speed"] > 0 for row in sped)
