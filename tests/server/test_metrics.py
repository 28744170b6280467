"""Metrics: what they are called, and that they equal what the engine and the cache counted."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import rootcellar
from rootcellar.server.app import create_app
from rootcellar.server.observe import metrics, observer
from rootcellar.server_config import ServerConfig

ROOT = Path(__file__).parents[2]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_folder):
    """An engine after a known workload: 6 requests of 40 tokens, the first two alike, and too many for the cache."""
    with rootcellar.Engine(model_path=tiny_folder, max_total_tokens=128, max_running_requests=2) as engine:
        for first in (0, 0, 100, 200, 300):
            engine.generate(input_ids=list(range(first, first + 40)), sampling_params=GREEDY)
        for _ in engine.generate(prompt="gone soon", sampling_params=GREEDY, stream=True):
            break
        engine.check()
        yield engine
        engine.check()


def ask(engine, path="/metrics", headers=None, **options) -> httpx.Response:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(engine, ServerConfig(**options)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(get())


def samples(response: httpx.Response) -> dict[tuple, float]:
    """Value by (name, label values in the order of the labels' names)."""
    assert response.status_code == 200
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_the_metrics_equal_what_is_known_of_the_workload(engine):
    found = samples(ask(engine))
    ended = {reason: found["rootcellar_finished_requests_total", reason] for reason in ("length", "stop", "abort")}
    assert ended == {"length": 5, "stop": 0, "abort": 1}
    gone = int(found["rootcellar_generated_tokens_total",]) - 5 * 8  # what the request that was left had by then
    assert gone >= 1
    prompt = len(engine.encode("gone soon"))
    assert found["rootcellar_prompt_tokens_total",] == 5 * 40 + prompt
    assert found["rootcellar_cached_prompt_tokens_total",] == 32
    assert found["rootcellar_cache_hit_tokens_total", "DEVICE"] == 32
    assert found["rootcellar_cache_lookup_tokens_total",] == 5 * 39 + prompt - 1
    assert found["rootcellar_prefill_tokens_total",] == 5 * 40 + prompt - 32
    assert found["rootcellar_time_to_first_token_seconds_count",] == 6
    assert found["rootcellar_queue_time_seconds_count",] == 6
    assert found["rootcellar_request_seconds_count",] == 6
    assert found["rootcellar_inter_token_latency_seconds_count",] == 5 * 7 + gone - 1
    assert found["rootcellar_step_seconds_count", "prefill"] == 6
    assert found["rootcellar_step_seconds_count", "decode"] == 5 * 7 + gone - 1
    assert found["rootcellar_stage_seconds_count", "TOKENIZE"] == 6
    assert all(found["rootcellar_requests", stage] == 0 for stage in engine.stats()["stages"])


def test_the_metrics_equal_the_stats_of_engine_and_cache(engine):
    found, stats = samples(ask(engine)), engine.stats()
    shelf = stats["cache"]["full"]["DEVICE"]
    assert shelf["evicted"] > 0
    for state in metrics.STATES:
        assert found["rootcellar_cache_tokens", "full", state, "DEVICE"] == shelf[state]
    assert sum(found["rootcellar_cache_tokens", "full", state, "DEVICE"] for state in metrics.STATES) == 128
    assert found["rootcellar_cache_size_tokens", "full", "DEVICE"] == shelf["size"] == 128
    assert found["rootcellar_cache_used_tokens", "full", "DEVICE"] == shelf["used"]
    assert found["rootcellar_cache_used_ratio", "DEVICE"] == shelf["used"] / 128
    assert found["rootcellar_evicted_tokens_total", "full", "DEVICE"] == shelf["evicted"]
    for age in ("age", "idle"):
        assert found[f"rootcellar_kv_{age}_at_eviction_seconds_count", "full", "DEVICE"] == shelf["evicted"]
    for name in ("retractions_total", "running_requests", "queued_requests", "compilations_total", "kv_cache_bytes"):
        key = {"running_requests": "running", "queued_requests": "waiting"}.get(name, name.removesuffix("_total"))
        assert found[f"rootcellar_{name}",] == stats[key]
    assert found["rootcellar_cache_nodes",] == stats["nodes"]
    outside, steps = (
        found[f"rootcellar_{name}", "decode"] for name in ("step_outside_device_seconds_total", "step_seconds_sum")
    )
    assert 0 < outside < steps


def test_what_became_of_the_calls_of_a_store_is_counted():
    calls = {"get": {"failures": 3, "damaged": 1, "skipped": 5}, "put": {"failures": 2, "damaged": 0, "skipped": 0}}
    breaker = {"left_alone": 2, "used_again": 1, "away": True}
    stats = {"copies": {"host-storage": {"pages": 7}, "store": calls, "breaker": breaker}}
    found = {row.name: dict(row.read(stats)) for row in metrics.TABLE if row.name.startswith("store_")}
    assert found == {
        "store_failures": {("get",): 3, ("put",): 2},
        "store_damaged_pages": {("get",): 1, ("put",): 0},
        "store_unasked_pages": {("get",): 5, ("put",): 0},
        "store_left_alone": {(): 2},
        "store_used_again": {(): 1},
    }


def test_ages_at_eviction_are_those_of_the_workload(engine):
    found = samples(ask(engine))
    oldest, count = (
        found[f"rootcellar_kv_age_at_eviction_seconds_{what}", "full", "DEVICE"] for what in ("sum", "count")
    )
    idle = found["rootcellar_kv_idle_at_eviction_seconds_sum", "full", "DEVICE"]
    assert 0 < idle <= oldest < count * engine.sight.reading().at


def test_every_row_and_histogram_is_there_under_its_type(engine):
    types = {f.name: f.type for f in text_string_to_metric_families(ask(engine).text)}
    for row in metrics.TABLE:
        assert types[f"rootcellar_{row.name}"] == row.kind
    for name in metrics.HISTOGRAMS:
        assert types[f"rootcellar_{name}"] == "histogram"
    assert "process_resident_memory_bytes" in types
    assert set(engine.sight.reading().distributions) == set(metrics.HISTOGRAMS)


def test_sglangs_names_come_with_the_flag_only(engine):
    assert "sglang:" not in ask(engine).text
    response = ask(engine, enable_sglang_metrics=True, served_model_name="m")
    found, ours = samples(response), samples(ask(engine))
    stats = engine.stats()
    assert found["sglang:num_running_reqs", "m"] == 0
    assert found["sglang:prompt_tokens_total", "m"] == stats["prompt_tokens"]
    assert found["sglang:generation_tokens_total", "m"] == stats["generated_tokens"]
    assert found["sglang:cached_tokens_total", "device", "m"] == found["sglang:cached_tokens_total", "total", "m"] == 32
    assert found["sglang:cache_hit_rate", "m"] == stats["hit_rate"]
    assert found["sglang:token_usage", "m"] == 0
    assert found["sglang:evicted_tokens_total", "m"] == stats["cache"]["full"]["DEVICE"]["evicted"]
    same = {"time_to_first_token_seconds": None, "e2e_request_latency_seconds": "request_seconds"}
    for theirs, name in same.items():
        assert found[f"sglang:{theirs}_sum", "m"] == ours[f"rootcellar_{name or theirs}_sum",]
    # What SGLang's own dashboard draws.
    for name in ("inter_token_latency_seconds_bucket", "num_queue_reqs", "e2e_request_latency_seconds_bucket"):
        assert f"sglang:{name}" in response.text


def test_openmetrics_is_spoken_to_those_who_ask(engine):
    response = ask(engine, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def scrapes_of_a_busy_engine(engine, *, before: int) -> list[httpx.Response]:
    """So many scrapes before the engine becomes busy for a long time, and one while it is."""
    app = create_app(engine, ServerConfig())
    go_on, began = threading.Event(), threading.Event()

    def block() -> None:
        began.set()
        assert go_on.wait(20)

    async def scrape() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            responses = [await client.get("/metrics") for _ in range(before)]
            busy = threading.Thread(target=lambda: engine._loop.call(block))
            busy.start()
            await asyncio.to_thread(began.wait)
            try:
                return [*responses, await asyncio.wait_for(client.get("/metrics"), 10)]
            finally:
                go_on.set()
                busy.join()

    return asyncio.run(scrape())


def test_a_scrape_does_not_wait_for_an_engine_that_is_busy(engine, monkeypatch):
    monkeypatch.setattr(observer, "PATIENCE", 0.2)
    first, second = map(samples, scrapes_of_a_busy_engine(engine, before=1))
    assert second["rootcellar_generated_tokens_total",] == first["rootcellar_generated_tokens_total",]


def test_a_first_scrape_of_an_engine_that_stays_busy_is_refused(engine, monkeypatch):
    monkeypatch.setattr(observer, "MOST_PATIENCE", 0.2)
    (refused,) = scrapes_of_a_busy_engine(engine, before=0)
    assert refused.status_code == 503
    assert "busy" in refused.json()["error"]["message"]


# -- what refers to the metrics ---------------------------------------------------------------------------------------


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\brootcellar_[a-z_]+", text))


def test_the_dashboard_draws_only_what_is_there(engine):
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    queries += [v["query"] for v in dashboard["templating"]["list"] if isinstance(v.get("query"), str)]
    there = {name for name, *_ in samples(ask(engine))}
    used = names_in(" ".join(queries))
    assert len(used) > 15
    assert used <= there
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_metric_is_documented(engine):
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    said = {f"rootcellar_{r.name}{'_total' * (r.kind == 'counter')}": (r.kind, r.labels, r.help) for r in metrics.TABLE}
    said |= {
        f"rootcellar_{name}": ("histogram", metrics.HISTOGRAM_LABELS.get(name, ()), help)
        for name, help in metrics.HISTOGRAMS.items()
    }
    for name, (kind, labels, help) in said.items():
        assert f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {help} |" in page
    assert {*said, "rootcellar_info"} == names_in(page) - {"rootcellar_"}
    theirs = {sample.name for f in text_string_to_metric_families(ask(engine, enable_sglang_metrics=True).text)
              for sample in f.samples if sample.name.startswith("sglang:")}  # fmt: skip
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in theirs}
    assert families == set(re.findall(r"sglang:[a-z_0-9]+", page))
