"""What can be seen of an engine while it runs: numbers, requests, the radix tree, the memory, a trace.

Everything is read between two steps, so it is of one moment; nothing here changes what is cached.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import CacheStats, NodeView
from rootcellar.engine.build import Parts
from rootcellar.engine.history import kinds_by_pool, occupancy
from rootcellar.engine.identity import tenant_in
from rootcellar.engine.loop import Loop
from rootcellar.engine.metrics import Counts, Distributions
from rootcellar.engine.output import Tracker
from rootcellar.engine.timeline import RequestRecord, StepRecord, chrome_trace
from rootcellar.scheduler import FORWARD, Stage
from rootcellar.scheduler.placeholders import image_runs

SHOWN_REQUESTS = 64
# Nodes of everybody's among which a tenant's own are sought.
LOOKED_AT = 4096
# What a page of a pool is now: free, cached and unused, shared and used by a request, or a request's own.
FREE, CACHED, SHARED, OWN = range(4)


@dataclass(frozen=True)
class Reading:
    """Numbers of one moment.

    Attributes:
        stats: as :meth:`Sight.stats` gives them.
        distributions: by name, each with its labels.
        requests: those alive, the oldest first, at most ``SHOWN_REQUESTS``.
        at: seconds since the engine began.
        tenant: whose; None: all.
    """

    stats: dict[str, Any]
    distributions: Distributions
    requests: list[dict[str, Any]]
    at: float
    tenant: str | None = None


class Sight:
    """Looks at one engine. Its methods may be called from any thread and wait for the step under way.

    With ``tenant`` they show what is one tenant's own, and nothing of others: neither what they ask nor how much.
    """

    def __init__(self, loop: Loop, parts: Parts) -> None:
        self._loop = loop
        self._machine = loop.machine
        self._parts = parts
        self._cache = parts.scheduler.cache

    def reading(self, tenant: str | None = None) -> Reading:
        """All numbers, of one moment."""
        return self._loop.call(lambda: self._reading(tenant))

    def stats(self, tenant: str | None = None) -> dict[str, Any]:
        """See ``Engine.stats``; of one tenant, the part of it that is about requests and their tokens."""
        return self._loop.call(lambda: self._stats(tenant))

    def asked_stats(self) -> Future[dict[str, Any]]:
        """The same without waiting for it."""
        return self._loop.ask(self._stats)

    def status(self) -> dict[str, Any]:
        """See ``Engine.status``."""
        return self._loop.call(self._status)

    def asked_status(self) -> Future[dict[str, Any]]:
        """The same without waiting for it."""
        return self._loop.ask(self._status)

    def trace(self, limit: int = 256, tenant: str | None = None) -> dict[str, Any]:
        """The ``limit`` newest requests and their steps as a Chrome trace; ``json.dump`` it and open it in Perfetto.

        A tenant's is without the steps, which it shares.
        """
        records, steps, now = self._loop.call(lambda: self._newest(limit, tenant))
        started = self._machine.recorder.began
        return chrome_trace(records, steps, now=now, started=started, wall=time.time() - (now - started))

    def tree(self, limit: int = 200, tenant: str | None = None) -> dict[str, Any]:
        """The ``limit`` most important nodes of the radix tree, and which requests go through them.

        ``{"page_size", "total", "nodes": [{"id", "parent", "namespace", "start", "length", "head", "images", "text",
        "held": {kind: {tier: tokens}}, "hits", "age", "idle", "in_use", "children"}], "requests": [{"rid", "stage",
        "tokens", "nodes": [id, ...]}]}``. ``images``: where in the head ids stand for images, as pairs of start and
        length. Lengths are tokens, ages seconds since the node was made and last used; requests are
        those alive and the last that ended. Where tenants share the cache, a tenant's nodes are those of its requests.
        """
        return self._with_text(self._loop.call(lambda: self._tree(limit, tenant)))

    def memory_map(self, cells: int = 2048) -> list[dict[str, Any]]:
        """What each page of the device's pools is now, in at most ``cells`` cells a pool.

        ``[{"pool", "pages", "pages_per_cell", "cells": "0123..."}]``: a digit a cell, 0 free, 1 cached, 2 shared and
        used by requests that run, 3 a running request's own; of several pages in a cell, what most of them are.
        """
        return self._loop.call(lambda: self._memory_map(cells))

    def look(self, limit: int = 200, cells: int = 2048, tenant: str | None = None) -> dict[str, Any]:
        """``{"tree", "memory"}`` of one moment, and the ``"seconds"`` of the engine's time that they took.

        A tenant sees no memory: it shares that.
        """

        def look() -> dict[str, Any]:
            began = self._machine.clock.now()
            memory = self._memory_map(cells) if tenant is None else []
            found = {"tree": self._tree(limit, tenant), "memory": memory}
            return {**found, "seconds": self._machine.clock.now() - began}

        found = self._loop.call(look)
        self._with_text(found["tree"])
        return found

    def history(self, tenant: str | None = None) -> list[dict[str, Any]]:
        """The last minutes in samples, the oldest first; see ``engine/history.py``. A tenant's is without occupancy."""
        recorder = self._machine.recorder
        samples = self._loop.call(lambda: recorder.history.of(tenant))
        return [sample.words(recorder.began) for sample in samples]

    def _with_text(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Add the nodes' text, on the caller's thread: it is for people, and takes a while."""
        if self._parts.tokenizer is not None:
            for node in tree["nodes"]:
                node["text"] = self._text(node["head"], node["images"])
        return tree

    def _text(self, ids: Sequence[int], images: Sequence[Sequence[int]]) -> str:
        """Token ids as text, ``[image]`` where they are none."""
        assert self._parts.tokenizer is not None
        decode, at, said = self._parts.tokenizer.decode, 0, ""
        for start, length in images:
            said += decode(ids[at:start], skip_special_tokens=False) + "[image]"
            at = start + length
        return said + decode(ids[at:], skip_special_tokens=False)

    # -- on the engine's thread -----------------------------------------------------------------------------------

    def _reading(self, tenant: str | None) -> Reading:
        now, metrics = self._machine.clock.now(), self._machine.recorder.metrics
        alive = self._machine.roster.of(tenant)[:SHOWN_REQUESTS]
        requests = [
            {
                "rid": t.request.rid,
                "stage": t.request.stage.value,
                "prompt_tokens": t.request.prompt_length,
                "cached_tokens": t.request.cached or 0,
                "completion_tokens": t.request.generated,
                "max_new_tokens": t.request.sampling.max_new_tokens,
                "seconds": now - t.received,
            }
            for t in alive
        ]
        distributions = metrics.distributions() if tenant is None else metrics.of(tenant).distributions()
        return Reading(self._stats(tenant), distributions, requests, now - self._machine.recorder.began, tenant)

    def _own_stats(self, counts: Counts, alive: list[Tracker]) -> dict[str, Any]:
        """What is about requests and their tokens: of all, or of one tenant."""
        by_stage = Counter(t.request.stage.value for t in alive)
        # Those of every engine, and others while somebody is in them.
        stages = [s.value for s in Stage if s is Stage.PREFILL_WAITING or s in FORWARD or by_stage[s.value]]
        running = sum(t.request.lease is not None for t in alive)
        return {
            "running": running,
            "waiting": len(alive) - running,
            "stages": {stage: by_stage[stage] for stage in stages},
            "finished": dict(counts.finished),
            "generated_tokens": counts.generated,
            "prompt_tokens": counts.prompt_tokens,
            "cached_tokens": counts.cached_tokens,
        }

    def _stats(self, tenant: str | None = None) -> dict[str, Any]:
        machine, scheduler, metrics = self._machine, self._parts.scheduler, self._machine.recorder.metrics
        parts = self._parts
        if tenant is not None:
            counts = metrics.of(tenant)
            found = {"input_tokens": counts.prompt_tokens, "hit_tokens": counts.cached_tokens, "occupancy": {}}
            return {**self._own_stats(counts, machine.roster.of(tenant)), **found}
        cache = self._cache.stats()
        return {
            **self._own_stats(metrics.all, machine.roster.of(None)),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "retractions": scheduler.retractions,
            "steps": machine.steps,
            "generated_tokens": machine.generated,
            "prefill_tokens": machine.prompted,
            "spec_verify_ct": metrics.verified,
            "spec_draft_tokens": metrics.drafted,
            "spec_accepted_tokens": metrics.accepted,
            "outside_seconds": dict(metrics.outside_seconds),
            "compilations": self._parts.compiles.count,
            "kv_cache_bytes": sum(p.nbytes for p in self._parts.runner.pools.values()),
            "host_cache_bytes": 0 if parts.host is None else parts.host.nbytes,
            "encoder": {} if machine.life.encodings is None else machine.life.encodings.counts(),
            "copies": {} if parts.mover is None else parts.mover.stats() | machine.peers.copies(),
            "disaggregation": machine.peers.stats(),
            "occupancy": occupancy(self._cache, self._parts.runner, cache),
            **_cache_fields(cache),
        }

    def _status(self) -> dict[str, Any]:
        machine = self._machine
        return {
            "paused": machine.paused,
            "released": sorted(machine.life.released),
            "weight_version": machine.life.version,
            "steps": machine.steps,
            "unfinished": len(machine.trackers) - machine.peers.meeting,
        }

    def _newest(self, limit: int, tenant: str | None) -> tuple[list[RequestRecord], list[StepRecord], float]:
        """The newest requests, the steps since the first of them came, and the time."""
        timeline, now = self._machine.recorder.timeline, self._machine.clock.now()
        alive = [RequestRecord.of(t, end=None) for t in self._machine.roster.of(tenant)]
        ended = [record for record in timeline.requests if tenant in (None, record.tenant)]
        records = [*ended, *alive][-limit:]
        if tenant is not None:
            return records, [], now
        first = min((record.stages[0][1] for record in records), default=now)
        return records, [step for step in timeline.steps if step.ended >= first], now

    def _tree(self, limit: int, tenant: str | None) -> dict[str, Any]:
        now = self._machine.clock.now()
        alive = [t.request for t in self._machine.roster.of(tenant)][:SHOWN_REQUESTS]
        found = [(r.rid, r.stage.value, r.key(r.length)) for r in alive]
        ended = self._machine.recorder.timeline.keys
        found += [(r.rid, Stage.FINISHED.value, key) for r, key in ended if tenant in (None, r.tenant)]
        requests = [
            {"rid": rid, "stage": stage, "tokens": len(key), "nodes": list(self._cache.trail(key))}
            for rid, stage, key in found
        ]
        view = self._cache.tree(limit if tenant is None else max(limit, LOOKED_AT))
        nodes, total = view.nodes, view.total
        if tenant is not None:
            own = self._own_nodes(nodes, requests, tenant)
            nodes, total = tuple(own[:limit]), len(own)
        return {
            "page_size": self._cache.page_size,
            "total": total,
            "nodes": [self._node(node, now) for node in nodes],
            "requests": requests,
        }

    def _own_nodes(self, nodes: Sequence[NodeView], requests: list[dict[str, Any]], tenant: str) -> list[NodeView]:
        """Those of the tenant's namespaces; where all share one, those whose every token its requests have."""
        if not self._parts.config.share_cache_across_keys:
            return [node for node in nodes if tenant_in(node.namespace) == tenant]
        reach: dict[int, int] = {}
        for request in requests:
            for id in request["nodes"]:
                reach[id] = max(reach.get(id, 0), request["tokens"])
        return [node for node in nodes if node.start + node.length <= reach.get(node.id, 0)]

    def _node(self, node: NodeView, now: float) -> dict[str, Any]:
        held: dict[str, dict[str, int]] = {}
        for (kind, tier), tokens in node.held.items():
            held.setdefault(kind, {})[tier.name] = tokens
        at = self._machine.recorder.metrics.ticks.at
        return {
            "id": node.id,
            "parent": node.parent,
            "namespace": node.namespace,
            "start": node.start,
            "length": node.length,
            "head": list(node.head),
            "images": image_runs(node.head),
            "held": held,
            "hits": node.hits,
            "age": now - at(node.created),
            "idle": now - at(node.used),
            "in_use": node.in_use,
            "children": node.children,
        }

    def _memory_map(self, cells: int) -> list[dict[str, Any]]:
        size, leases = self._cache.page_size, [r.lease for r in self._parts.scheduler.running]
        result = []
        for name, kinds in kinds_by_pool(self._cache, self._parts.runner).items():
            state = np.full(self._parts.runner.pools[name].pages + 1, FREE, np.uint8)
            state[self._cache.used_pages(kinds[0].name)] = CACHED
            for kind, lease in itertools.product(kinds, leases):
                assert lease is not None
                row = self._cache.tables[kind.name][lease.row]
                shared = 1 if kind.rule == "recurrent" else lease.committed // size
                state[row[:shared]] = SHARED
                state[row[shared:]] = OWN
            result.append({"pool": name, "pages": len(state) - 1, **_cells(state[1:], cells)})
        return result


def _cells(state: NDArray[np.uint8], most: int) -> dict[str, Any]:
    """``state`` of each page as at most ``most`` digits: the commonest of a cell's pages, the busier of equals."""
    each = max(1, -(-len(state) // most))
    padded = np.pad(state, (0, -len(state) % each), mode="edge" if len(state) else "constant").reshape(-1, each)
    counts = np.stack([(padded == value).sum(axis=1) for value in (OWN, SHARED, CACHED, FREE)])
    commonest = 3 - counts.argmax(axis=0)
    return {"pages_per_cell": each, "cells": "".join(map(str, commonest.tolist()))}


def _cache_fields(stats: CacheStats) -> dict[str, Any]:
    cache: dict[str, dict[str, Any]] = {}
    for (kind, tier), shelf in stats.shelves.items():
        cache.setdefault(kind, {})[tier.name] = dataclasses.asdict(shelf)
    return {
        "requests": stats.requests,
        "input_tokens": stats.input_tokens,
        "hit_tokens": stats.hit_tokens,
        "hit_tokens_by_tier": {tier.name: tokens for tier, tokens in stats.hit_tokens_by_tier.items()},
        "hit_rate": stats.hit_rate,
        "nodes": stats.nodes,
        "cache": cache,
    }
