"""What an engine is doing, as plain values; read on its own thread."""

from __future__ import annotations

import dataclasses
from typing import Any

from rootcellar.cache import CacheStats
from rootcellar.engine.build import Parts
from rootcellar.engine.loop import Loop


def stats(parts: Parts, loop: Loop) -> dict[str, Any]:
    """See ``Engine.stats``."""
    scheduler = parts.scheduler
    return {
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "retractions": scheduler.retractions,
        "steps": loop.steps,
        "generated_tokens": loop.generated,
        "prefill_tokens": loop.prompted,
        "compilations": parts.compiles.count,
        "kv_cache_bytes": sum(p.nbytes for p in parts.runner.pools.values()),
        **_cache_fields(scheduler.cache.stats()),
    }


def status(loop: Loop) -> dict[str, Any]:
    """See ``Engine.status``."""
    return {
        "paused": loop.paused,
        "released": sorted(loop.life.released),
        "weight_version": loop.life.version,
        "steps": loop.steps,
    }


def _cache_fields(stats: CacheStats) -> dict[str, Any]:
    cache: dict[str, dict[str, Any]] = {}
    for (kind, tier), shelf in stats.shelves.items():
        cache.setdefault(kind, {})[tier.name] = dataclasses.asdict(shelf)
    return {
        "requests": stats.requests,
        "input_tokens": stats.input_tokens,
        "hit_tokens": stats.hit_tokens,
        "hit_rate": stats.hit_rate,
        "cache": cache,
    }
