"""What the engine counts, remembers and logs of its own work."""

from __future__ import annotations

import bisect
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rootcellar
from rootcellar.cache import Eviction, Key, Tier
from rootcellar.engine.history import INTERVAL, SAMPLES, TENANTS_SAMPLES, History
from rootcellar.engine.metrics import MOST_TENANTS, Histogram, Metrics, TickTimes
from rootcellar.engine.timeline import KEY_TOKENS, KEYS, RequestRecord, Timeline, chrome_trace

GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


# -- counting ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 10), max_size=50), st.lists(st.floats(0, 10), unique=True, max_size=8).map(sorted))
def test_a_histogram_counts_each_value_in_the_first_bucket_that_holds_it(values, bounds):
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    view = histogram.view()
    for i, bound in enumerate(bounds):
        assert sum(view.counts[: i + 1]) == sum(value <= bound for value in values)
    assert view.count == len(values)
    assert view.sum == pytest.approx(sum(values))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 12))
def test_tick_times_equal_a_list_of_all_of_them(steps, size):
    """Several ticks may pass at once; those too old to be known count as the oldest that is."""
    ticks = TickTimes(0.0, size=size)
    times = [0.0]
    for now, step in enumerate(steps, start=1):
        times += [float(now)] * step
        ticks.note(len(times) - 1, float(now))
    for tick, time in enumerate(times):
        oldest = max(0, len(times) - size)
        assert ticks.at(tick) == (time if tick >= oldest else times[oldest])


def test_kv_is_aged_by_its_ticks_and_counted_by_the_token():
    metrics = Metrics(100.0)
    for tick, now in ((1, 101.0), (2, 110.0), (3, 150.0)):
        metrics.cache_moved_on(tick, [], now)
    gone = Eviction(3, "full", Tier.DEVICE, 48, created=1, used=2)
    metrics.cache_moved_on(3, [gone], 160.0)
    found = metrics.distributions()
    for name, age in (("kv_age_at_eviction_seconds", 59.0), ("kv_idle_at_eviction_seconds", 50.0)):
        ((labels, distribution),) = found[name]
        assert labels == {"kind": "full", "tier": "DEVICE"}
        assert distribution.count == 48
        assert distribution.sum == pytest.approx(48 * age)
        assert distribution.counts[bisect.bisect_left(distribution.bounds, age)] == 48


# -- remembering ------------------------------------------------------------------------------------------------------


def record(rid: str, begin: float, end: float | None) -> RequestRecord:
    return RequestRecord(rid, (("TOKENIZE", begin), ("DECODE_LOOP", begin)), end, 1, 0, 1, 0, None)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), min_size=1, max_size=30))
def test_there_are_as_many_lanes_as_requests_were_alive_at_once(spans):
    requests = [record(str(i), begin, begin + length) for i, (begin, length) in enumerate(spans)]
    events = chrome_trace(requests, [], now=50, started=0)["traceEvents"]
    lanes = {e["tid"] for e in events if e["ph"] == "X"}
    most = max(sum(b <= t < b + n for b, n in spans) for t in range(41))
    assert len(lanes) == most
    assert {e["tid"] for e in events if e["name"] == "thread_name" and e["pid"] == 1} == lanes


def test_what_lives_lasts_until_now_in_a_trace():
    events = chrome_trace([record("r", 1.0, None)], [], now=3.5, started=1.0)["traceEvents"]
    (whole,) = [e for e in events if e["name"] == "r"]
    assert (whole["ts"], whole["dur"]) == (0, 2_500_000)


def test_prompts_are_remembered_within_bounds():
    timeline = Timeline()
    for i in range(KEYS + 10):
        timeline.ended(record(str(i), 0, 1), Key(range(10)))
    assert [each.rid for each, _ in timeline.keys] == [str(i) for i in range(10, KEYS + 10)]
    timeline.ended(record("long", 0, 1), Key(range(KEY_TOKENS - 25)))
    assert [each.rid for each, _ in timeline.keys][-3:] == [str(KEYS + 8), str(KEYS + 9), "long"]
    assert sum(len(key) for _, key in timeline.keys) <= KEY_TOKENS


def test_a_retraction_is_a_stage_of_its_own(tiny_folder, caplog):
    """Two requests that do not fit together: one waits again, and its times say so."""
    options = {"model_path": tiny_folder, "max_total_tokens": 128, "max_running_requests": 2, "log_level": "info"}
    with caplog.at_level(logging.INFO, "rootcellar"), rootcellar.Engine(**options) as engine:
        both = engine.generate(
            input_ids=[list(range(30)), list(range(50, 80))],
            sampling_params={**GREEDY, "max_new_tokens": 60},
            rid=["old", "young"],
        )
        engine.check()
        found = engine.sight.reading()
    retracted = [r["meta_info"] for r in both if r["meta_info"]["retractions"]]
    assert retracted
    names = [name for name, _ in retracted[0]["stages"]]
    assert names.count("PREFILL_WAITING") >= 2
    times = [at for _, at in retracted[0]["stages"]]
    assert times == sorted(times)
    assert f"request {retracted[0]['id']} was retracted" in caplog.text
    assert found.stats["retractions"] >= 1
    stages = {labels["stage"]: d for labels, d in found.distributions["stage_seconds"]}
    assert stages["PREFILL_WAITING"].count >= 3
    # Every token but a request's first has a gap before it, across retractions too.
    assert found.distributions["inter_token_latency_seconds"][0][1].count == 2 * 60 - 2


@pytest.fixture(scope="module")
def engine(tiny_folder):
    with rootcellar.Engine(model_path=tiny_folder, max_total_tokens=256, max_running_requests=2) as engine:
        yield engine


def at(engine, *times: float) -> list[float]:
    """The times of the samples that idle steps at these times leave, in a history of their own."""
    history = History(engine._parts.scheduler, engine._parts.runner, Metrics(times[0]), times[0])
    for now in times:
        history.step_ended(0, now)
    return [sample.at for sample in history.of(None)]


def test_many_short_requests_do_not_push_out_the_minutes_before(engine):
    assert at(engine, 0.0, 5.0, 5.5, 5.75, 6.5, 6.75) == [0.0, 5.0, 5.75, 6.5, 6.75]
    kept = at(engine, *(i / 4 for i in range(3 * SAMPLES)))
    assert len(kept) == SAMPLES
    assert all(later - earlier >= INTERVAL for earlier, later in zip(kept, kept[2:], strict=False))
    assert kept[-1] - kept[0] >= 300


def test_samples_are_what_a_reading_says_and_a_tenants_are_its_own(engine):
    for tenant, times in (("alice", 1), ("bob", 2)):
        for _ in range(times):
            engine.generate(input_ids=list(range(40)), sampling_params=GREEDY, tenant=tenant)
    for tenant in (None, "alice", "bob"):
        sample, reading = engine.sight.history(tenant)[-1], engine.sight.reading(tenant)
        assert sample["stats"] == {name: reading.stats[name] for name in sample["stats"]}
        first = reading.distributions["time_to_first_token_seconds"][0][1]
        assert sample["latency"] == {"first_token": {"count": first.count, "sum": first.sum}}
        assert 0 < sample["at"] <= reading.at
    assert engine.sight.history("alice")[-1]["stats"]["generated_tokens"] == GREEDY["max_new_tokens"]
    assert engine.sight.history("alice")[-1]["stats"]["occupancy"] == {}
    assert engine.sight.history("nobody") == []


def test_samples_of_tenants_are_bounded_together(engine):
    metrics = Metrics(0.0)
    history = History(engine._parts.scheduler, engine._parts.runner, metrics, 0.0)
    names = [f"tenant {i}" for i in range(MOST_TENANTS)]
    for now in range(20):
        for name in names:
            metrics.of(name).next_token(0.1)
        history.step_ended(now, 2.0 * now)
    assert sum(len(history.of(name)) for name in names) <= TENANTS_SAMPLES
    assert {len(history.of(name)) for name in names} == {TENANTS_SAMPLES // MOST_TENANTS}
    metrics.of("one too many")
    history.step_ended(0, 1000.0)
    assert history.of(names[0]) == []
    assert history.of(names[1])


# -- logging ----------------------------------------------------------------------------------------------------------

LINE = re.compile(
    r"running (\d+), queued (\d+), generated ([\d.]+) tok/s, prefilled ([\d.]+) tok/s, cache used: full DEVICE (\d+)%, "
    r"hit rate (\S+), retractions (\d+)"
)


def lines(caplog) -> list[re.Match]:
    return [found for r in caplog.records if (found := LINE.fullmatch(r.getMessage()))]


def test_the_log_says_what_the_engine_does_once_an_interval(tiny_folder, caplog):
    options = {"model_path": tiny_folder, "max_total_tokens": 512, "log_level": "info", "log_interval": 0.05}
    with caplog.at_level(logging.INFO, "rootcellar"), rootcellar.Engine(**options) as engine:
        engine.generate(input_ids=list(range(100)), sampling_params={**GREEDY, "max_new_tokens": 300})
        while_running = lines(caplog)
        # Not before the interval is over, however much ends in between.
        for _ in range(5):
            engine.generate(input_ids=list(range(100)), sampling_params={**GREEDY, "max_new_tokens": 1})
    assert while_running
    assert all(float(line[3]) > 0 for line in while_running[1:])
    assert while_running[0][1] == "1"
    assert all(int(line[5]) > 0 for line in while_running)
    assert len(lines(caplog)) <= len(while_running) + 5


def test_an_engine_with_long_intervals_reports_when_its_first_work_ends_and_is_then_silent(tiny_folder, caplog):
    options = {"model_path": tiny_folder, "max_total_tokens": 512, "log_level": "info", "log_interval": 1000}
    with caplog.at_level(logging.INFO, "rootcellar"), rootcellar.Engine(**options) as engine:
        for _ in range(3):
            engine.generate(input_ids=list(range(100)), sampling_params=GREEDY)
    (line,) = lines(caplog)
    assert (line[1], line[2]) == ("0", "0")
    assert line[6] == "0%"


def test_a_request_that_ends_early_is_logged_by_name(tiny_folder, caplog):
    options = {"model_path": tiny_folder, "max_total_tokens": 512, "log_level": "info", "request_timeout": 0.01}
    with caplog.at_level(logging.INFO, "rootcellar"), rootcellar.Engine(**options) as engine:
        engine.generate(input_ids=[1, 2, 3], sampling_params={**GREEDY, "max_new_tokens": 400}, rid="too-slow")
    assert "request too-slow ended early: timed out" in caplog.text
