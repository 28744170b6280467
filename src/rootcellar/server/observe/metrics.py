"""Prometheus metrics of one reading of the engine.

``TABLE`` is the list of what there is, one row a metric; histograms come from the engine under their own names. With
``sglang`` the same figures are there once more under SGLang's names, for dashboards that were made for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

import rootcellar
from rootcellar.engine.metrics import Distribution
from rootcellar.engine.sight import Reading

Stats = dict[str, Any]
Samples = Iterable[tuple[tuple[str, ...], float]]
STATES = ("free", "evictable", "pinned", "leased", "in_flight")


@dataclass(frozen=True, slots=True)
class Row:
    """One metric: its name without prefix, what it says, its labels, and how to read it off the engine's stats."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...]
    read: Callable[[Stats], Samples]
    own: bool = False  # there is one of each tenant's requests, too


def _total(key: str) -> Callable[[Stats], Samples]:
    return lambda stats: [((), stats[key])]


def _by(key: str) -> Callable[[Stats], Samples]:
    return lambda stats: [((name,), value) for name, value in stats[key].items()]


def _shelves(*fields: str) -> Callable[[Stats], Samples]:
    """The named fields of each kind and tier; with several, the field's name is the last label."""

    def read(stats: Stats) -> Samples:
        for kind, tiers in stats["cache"].items():
            for tier, shelf in tiers.items():
                for field in fields:
                    yield (kind, tier, field)[: 2 + (len(fields) > 1)], shelf[field]

    return read


def _copies(field: str) -> Callable[[Stats], Samples]:
    """A field of each pair of tiers between which pages are copied, as ``device-host``."""
    return lambda stats: [((lane,), counts[field]) for lane, counts in stats["copies"].items() if field in counts]


def _encoder(field: str) -> Callable[[Stats], Samples]:
    """A field of what the encoder of images did, where the model has one."""
    return lambda stats: [((), stats["encoder"][field])] if stats["encoder"] else []


def _store(field: str) -> Callable[[Stats], Samples]:
    """A field of each call of the store behind the host, by the call's name."""
    return lambda stats: [((call,), counts[field]) for call, counts in stats["copies"].get("store", {}).items()]


def _breaker(field: str) -> Callable[[Stats], Samples]:
    """A field of what the store's guard counts."""
    return lambda stats: [((), stats["copies"]["breaker"][field])] if "breaker" in stats["copies"] else []


TABLE = (
    Row("requests", "gauge", "Requests alive, by the stage that they are in.", ("stage",), _by("stages"), own=True),
    Row("running_requests", "gauge", "Requests that hold a lease on the cache.", (), _total("running"), own=True),
    Row("queued_requests", "gauge", "Requests that wait to start, or to start again.", (), _total("waiting"), own=True),
    Row("finished_requests", "counter", "Requests that ended, by how.", ("reason",), _by("finished"), own=True),
    Row(
        "retractions", "counter", "Times a running request gave its memory back and waited.", (), _total("retractions")
    ),
    Row(
        "prompt_tokens",
        "counter",
        "Prompt tokens of requests, counted at their first token.",
        (),
        _total("prompt_tokens"),
        own=True,
    ),
    Row(
        "cached_prompt_tokens",
        "counter",
        "Those of them that came from the cache.",
        (),
        _total("cached_tokens"),
        own=True,
    ),
    Row(
        "prefill_tokens",
        "counter",
        "Tokens computed in prefill steps, after retractions again.",
        (),
        _total("prefill_tokens"),
    ),
    Row("generated_tokens", "counter", "Tokens chosen.", (), _total("generated_tokens"), own=True),
    Row(
        "spec_verify",
        "counter",
        "Rows of decode steps in which tokens were guessed or might have been.",
        (),
        _total("spec_verify_ct"),
    ),
    Row("spec_draft_tokens", "counter", "Tokens guessed.", (), _total("spec_draft_tokens")),
    Row("spec_accepted_tokens", "counter", "Those of them that were right.", (), _total("spec_accepted_tokens")),
    Row(
        "cache_lookup_tokens", "counter", "Tokens of the keys for which leases were opened.", (), _total("input_tokens")
    ),
    Row(
        "cache_hit_tokens",
        "counter",
        "Those of them that were found, by the tier that had them.",
        ("tier",),
        _by("hit_tokens_by_tier"),
    ),
    Row(
        "cache_tokens",
        "gauge",
        "What the cache's room is used for, in tokens (states of a recurrent kind).",
        ("kind", "tier", "state"),
        _shelves(*STATES),
    ),
    Row("cache_used_tokens", "gauge", "Room that is not free.", ("kind", "tier"), _shelves("used")),
    Row("cache_size_tokens", "gauge", "Room in all.", ("kind", "tier"), _shelves("size")),
    Row(
        "cache_used_ratio",
        "gauge",
        "The part of a tier's room that is not free (the device's pools by their bytes).",
        ("tier",),
        lambda stats: [((tier,), part["used"]) for tier, part in stats["occupancy"].items()],
    ),
    Row("evicted_tokens", "counter", "Tokens that left to make room.", ("kind", "tier"), _shelves("evicted")),
    Row("cache_nodes", "gauge", "Nodes of the radix tree.", (), _total("nodes")),
    Row("kv_cache_bytes", "gauge", "Bytes of the KV cache's buffers on the device.", (), _total("kv_cache_bytes")),
    Row("host_cache_bytes", "gauge", "Bytes of the KV cache in host memory.", (), _total("host_cache_bytes")),
    Row("encoder_images", "counter", "Images that were encoded.", (), _encoder("encoded")),
    Row(
        "encoder_used_images",
        "counter",
        "Images that prompts were computed with; beyond those encoded, the encoder cache had them.",
        (),
        _encoder("computed"),
    ),
    Row("encoder_seconds", "counter", "Time that the engine spent on encoding.", (), _encoder("seconds")),
    Row("encoder_evicted_images", "counter", "Images that left the encoder cache.", (), _encoder("evicted")),
    Row("encoder_cache_images", "gauge", "Images in the encoder cache.", (), _encoder("kept")),
    Row("encoder_cache_bytes", "gauge", "Bytes of the encoder cache.", (), _encoder("bytes")),
    Row("encoder_host_images", "gauge", "Images of the encoder cache in host memory.", (), _encoder("host_kept")),
    Row("encoder_host_bytes", "gauge", "Bytes of the encoder cache in host memory.", (), _encoder("host_bytes")),
    Row("copied_pages", "counter", "Pages copied between two tiers.", ("lane",), _copies("pages")),
    Row("copied_bytes", "counter", "Bytes copied between two tiers.", ("lane",), _copies("bytes")),
    Row(
        "copy_seconds",
        "counter",
        "Time that those who copy between two tiers worked or waited for the device.",
        ("lane",),
        _copies("seconds"),
    ),
    Row("copy_queue_bytes", "gauge", "Bytes that wait to be copied.", ("lane",), _copies("queued_bytes")),
    Row(
        "skipped_pages",
        "counter",
        "Pages that were not copied because too much waited.",
        ("lane",),
        _copies("skipped_pages"),
    ),
    Row("failed_pages", "counter", "Pages whose copy failed.", ("lane",), _copies("failed_pages")),
    Row("store_failures", "counter", "Calls of the store that failed or were late.", ("call",), _store("failures")),
    Row("store_damaged_pages", "counter", "Pages of the store that were not whole.", ("call",), _store("damaged")),
    Row("store_unasked_pages", "counter", "Pages that the store was not asked for.", ("call",), _store("skipped")),
    Row("store_left_alone", "counter", "Times the store was left alone.", (), _breaker("left_alone")),
    Row("store_used_again", "counter", "Times it was used again after that.", (), _breaker("used_again")),
    Row(
        "step_outside_device_seconds",
        "counter",
        "The part of the steps' time in which the device had nothing to do.",
        ("phase",),
        _by("outside_seconds"),
    ),
    Row(
        "compilations",
        "counter",
        "Programs compiled or loaded since the engine began; should stand still.",
        (),
        _total("compilations"),
    ),
)

HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between two tokens of a request.",
    "queue_time_seconds": "From a request's arrival in the queue to its first step.",
    "request_seconds": "From a request's arrival to its end.",
    "stage_seconds": "How long requests stayed in each stage.",
    "step_seconds": "A step of the engine, planning and delivery included.",
    "kv_age_at_eviction_seconds": "Age of evicted tokens since they came into the tree.",
    "kv_idle_at_eviction_seconds": "Age of evicted tokens since they were last used.",
}
HISTOGRAM_LABELS = {
    "stage_seconds": ("stage",),
    "step_seconds": ("phase",),
    "kv_age_at_eviction_seconds": ("kind", "tier"),
    "kv_idle_at_eviction_seconds": ("kind", "tier"),
}


class Source:
    """A collector for ``prometheus_client``: gives the metrics of one reading, the engine's or a tenant's."""

    def __init__(self, reading: Reading, model_name: str, *, sglang: bool) -> None:
        """``sglang``: under SGLang's names too, of the engine's."""
        self._reading = reading
        self._model_name = model_name
        self._sglang = sglang

    def collect(self) -> Iterator[Metric]:
        """Every metric."""
        yield InfoMetricFamily(
            "rootcellar", "What runs.", {"version": rootcellar.__version__, "model_name": self._model_name}
        )
        yield from families(self._reading)
        if self._sglang and self._reading.tenant is None:
            yield from sglang_families(self._reading, self._model_name)


def families(reading: Reading) -> Iterator[Metric]:
    """The metrics under our own names; of a tenant's reading those that are about its requests."""
    for row in TABLE:
        if not (row.own or reading.tenant is None):
            continue
        family = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}[row.kind]
        metric = family(f"rootcellar_{row.name}", row.help, labels=row.labels)
        for labels, value in row.read(reading.stats):
            metric.add_metric(labels, value)
        yield metric
    for name, distributions in reading.distributions.items():
        histogram = HistogramMetricFamily(f"rootcellar_{name}", HISTOGRAMS[name], labels=HISTOGRAM_LABELS.get(name, ()))
        for labels, distribution in distributions:
            _add(histogram, tuple(labels.values()), distribution)
        yield histogram


def _add(histogram: HistogramMetricFamily, labels: tuple[str, ...], distribution: Distribution) -> None:
    bounds = [floatToGoString(bound) for bound in distribution.bounds] + ["+Inf"]
    cumulative = accumulate(distribution.counts)
    histogram.add_metric(labels, list(zip(bounds, cumulative, strict=True)), sum_value=distribution.sum)


def sglang_families(reading: Reading, model_name: str) -> Iterator[Metric]:
    """Those of SGLang's metrics that have a meaning here, under its names and with its label ``model_name``."""
    stats = reading.stats
    device = [shelves["DEVICE"] for shelves in stats["cache"].values()]
    first = device[0]
    gauges = {
        "num_running_reqs": (stats["running"], "Requests that run."),
        "num_queue_reqs": (stats["waiting"], "Requests that wait."),
        "num_used_tokens": (first["used"] - first["evictable"], "Tokens of the KV cache that are in use."),
        "token_usage": (
            stats["occupancy"]["DEVICE"]["busy"],
            "The part of the KV cache that is in use: neither free nor evictable.",
        ),
        "kv_available_tokens": (first["free"], "Free tokens of the KV cache."),
        "kv_evictable_tokens": (first["evictable"], "Cached tokens that may be evicted."),
        "kv_used_tokens": (first["used"] - first["evictable"], "Tokens that are in use."),
        "max_total_num_tokens": (first["size"], "Tokens that the KV cache holds."),
        "cache_hit_rate": (stats["hit_rate"], "Hit tokens over input tokens."),
        "spec_accept_length": (
            1 + stats["spec_accepted_tokens"] / max(1, stats["spec_verify_ct"]),
            "Tokens that a decode step gives a request.",
        ),
        "spec_accept_rate": (
            stats["spec_accepted_tokens"] / max(1, stats["spec_draft_tokens"]),
            "The part of the guessed tokens that were right.",
        ),
    }
    for name, (value, help) in gauges.items():
        gauge = GaugeMetricFamily(f"sglang:{name}", help, labels=("model_name",))
        gauge.add_metric((model_name,), value)
        yield gauge
    counters = {
        "prompt_tokens": (stats["prompt_tokens"], "Prompt tokens."),
        "generation_tokens": (stats["generated_tokens"], "Tokens generated."),
        "num_requests": (sum(stats["finished"].values()), "Requests that ended."),
        "num_aborted_requests": (stats["finished"]["abort"], "Requests that were aborted."),
        "num_retracted_requests": (stats["retractions"], "Retractions."),
        "evicted_tokens": (sum(s["evicted"] for s in device), "Tokens evicted from the device."),
    }
    for name, (value, help) in counters.items():
        counter = CounterMetricFamily(f"sglang:{name}", help, labels=("model_name",))
        counter.add_metric((model_name,), value)
        yield counter
    cached = CounterMetricFamily(
        "sglang:cached_tokens", "Prompt tokens found, by source.", labels=("model_name", "cache_source")
    )
    for tier, tokens in stats["hit_tokens_by_tier"].items():
        cached.add_metric((model_name, tier.lower()), tokens)
    cached.add_metric((model_name, "total"), stats["hit_tokens"])
    yield cached
    for theirs, ours in (
        ("time_to_first_token_seconds", "time_to_first_token_seconds"),
        ("inter_token_latency_seconds", "inter_token_latency_seconds"),
        ("e2e_request_latency_seconds", "request_seconds"),
        ("queue_time_seconds", "queue_time_seconds"),
        ("per_stage_req_latency_seconds", "stage_seconds"),
    ):
        histogram = HistogramMetricFamily(
            f"sglang:{theirs}", HISTOGRAMS[ours], labels=("model_name", *HISTOGRAM_LABELS.get(ours, ()))
        )
        for labels, distribution in reading.distributions[ours]:
            _add(histogram, (model_name, *labels.values()), distribution)
        yield histogram
