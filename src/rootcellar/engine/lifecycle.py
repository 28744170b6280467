"""Memory and weights come and go while the engine lives: for training on the same device between two rollouts.

Everything here runs on the engine's thread between two steps, when no request runs or none may be disturbed.

A part of the memory is named by a *tag*: ``kv_cache`` (the pools) or ``weights``. What is released is given back at
once, each buffer deleted, and the engine refuses new requests until it is resumed. Rebuilt buffers have the shapes,
dtypes and shardings of before, so nothing compiles again.

Stale KV cannot be hit: what the weights are is part of every cache key's namespace.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.cache import Reports, Tier
from rootcellar.engine.build import Parts, Weights
from rootcellar.engine.copies import AnyMover, settle
from rootcellar.engine.encodings import Encodings
from rootcellar.engine.identity import check_name
from rootcellar.engine.routing import Routing
from rootcellar.errors import ConfigError, EngineError, ModelError
from rootcellar.models.kinds import EXPERTS
from rootcellar.models.params import check_params, declare, path_name
from rootcellar.models.places import lies_at
from rootcellar.models.repacking import Repacking, TensorsOf
from rootcellar.models.spec import Params
from rootcellar.ops.panels import Packed
from rootcellar.pools.copying import BLOCKS, Copier, read_pages
from rootcellar.pools.images import Images
from rootcellar.runner import Runner
from rootcellar.runner.runner import Program
from rootcellar.scheduler import Scheduler

TAGS = ("kv_cache", "weights")


@dataclass
class Lifecycle:
    """What is released now, and the weights' version.

    Attributes:
        reload: gives the weights again when they are the engine's own; None when they were handed over.
        weights: what the weights are, in a word (``identity``): KV computed with other ones is never a hit.
        version: what users call them.
        released: tags whose memory is given back.
        mover: who copies between tiers; None where the device is the only one.
        missed: what was seen while copies were waited for; the next report begins with it.
        encodings: what an encoder made of pictures; None where the model has none.
        routing: what reads which experts tokens went through; None where that is not kept.
        saved: for each pool whose cached pages wait on the host without a tier there, their numbers and bytes.
    """

    scheduler: Scheduler
    runner: Runner
    reload: Callable[[], Weights] | None
    weights: str
    version: str = "0"
    mover: AnyMover | None = None
    encodings: Encodings | None = None
    routing: Routing | None = None
    released: set[str] = field(default_factory=set)
    missed: Reports = field(default_factory=Reports)
    saved: dict[str, Saved] = field(default_factory=dict)
    _made: list[Array] = field(default_factory=list)
    """Of the weights in use, those made here of a trainer's: the engine's own, and written over by the next."""
    _repackings: dict[TensorsOf, Repacking] = field(default_factory=dict)
    _dtypes: list[tuple[jnp.dtype, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Parts) -> Lifecycle:
        """That of an engine made of these."""
        encodings = None
        if (encoder := parts.model.encoder) is not None:
            room, chunk = parts.config.mm_cache_size * 2**20, parts.config.chunked_prefill_size
            host = int(parts.config.hicache_ratio * room) if parts.config.enable_hierarchical_cache else 0
            encodings = Encodings(encoder, parts.scheduler, parts.runner, room, chunk, host)
        made = parts.scheduler, parts.runner, parts.reload, parts.weights
        routing = Routing(parts.runner) if parts.config.enable_return_routed_experts else None
        return cls(*made, mover=parts.mover, encodings=encodings, routing=routing)

    def _forget_encodings(self) -> None:
        if self.encodings is not None:
            self.encodings.forget()

    def __post_init__(self) -> None:
        self._dtypes = [self._taken(leaf) for leaf in _leaves(self.runner.params)]
        self.scheduler.set_epoch(self.weights)

    def _taken(self, leaf: Any) -> tuple[jnp.dtype, ...]:
        """What may come in the place of a parameter: a packed one is packed anew from either width."""
        return (self.runner.programs.dtype, jnp.dtype(jnp.bfloat16)) if isinstance(leaf, Packed) else (leaf.dtype,)

    @cached_property
    def programs(self) -> list[Program]:
        """All that can be compiled ahead: what steps need, then what copies do."""
        runner = self.runner
        copiers = runner.copiers if self.mover is not None else {}
        if EXPERTS in runner.pools:  # whose pages are read for who asks
            copiers = {EXPERTS: runner.copiers[EXPERTS], **copiers}
        copies = [Program(f"copies of {name}", False, each.compile) for name, each in copiers.items()]
        seen = [] if self.encodings is None else self.encodings.each_program()
        return runner.each_program() + seen + copies

    def require_memory(self) -> None:
        """Raise ``EngineError`` when something is released."""
        if self.released:
            tags = sorted(self.released)
            raise EngineError(f"{' and '.join(tags)} released: call resume_memory_occupation({tags}) first")

    def settle(self) -> None:
        """Wait until no copy is planned or under way, or a store hangs."""
        self.missed += settle(self.scheduler, self.mover)

    # -- memory ---------------------------------------------------------------------------------------------------

    def release(self, tags: Sequence[str], preserve: bool, clear_compiled: bool) -> dict[str, Any]:
        """Give memory back; no request runs. See ``Engine.release_memory_occupation``."""
        before = _resident_bytes()
        buffers = nbytes = 0
        self._forget_encodings()
        if "kv_cache" in tags and "kv_cache" not in self.released:
            self.settle()
            if not preserve:
                self.scheduler.cache.flush()
            elif self.mover is not None:
                self.scheduler.cache.save()
                self.settle()
                self.scheduler.cache.forget_tier(Tier.DEVICE)
            else:
                self.saved = {name: self._save(name) for name in self.runner.pools}
            for pool in self.runner.pools.values():
                buffers += len(jax.tree.leaves(pool.buffers))
                nbytes += pool.free()
            self.released.add("kv_cache")
        if "weights" in tags and "weights" not in self.released:
            # What was handed over belongs to the caller: only our hold on it ends.
            leaves: list[Array] = self._made if self.reload is None else jax.tree.leaves(self.runner.params)
            buffers += len(leaves)
            nbytes += sum(leaf.nbytes for leaf in leaves)
            for leaf in leaves:
                leaf.delete()
            self._made = []
            self.runner.params = {}
            self.released.add("weights")
        if clear_compiled:
            jax.clear_caches()
        after = _resident_bytes()
        returned = None if before is None or after is None else before - after
        return {"buffers": buffers, "bytes": nbytes, "resident_bytes": returned}

    def resume(self, tags: Sequence[str]) -> dict[str, Any]:
        """Take the memory again. See ``Engine.resume_memory_occupation``."""
        buffers = nbytes = 0
        if "weights" in tags and "weights" in self.released:
            if self.reload is None:
                raise EngineError("the weights were handed over, and released: give new ones with update_weights")
            read = self.reload()  # perhaps changed meanwhile
            self.runner.params = read.params
            self._are(read.identity)
            leaves = jax.tree.leaves(self.runner.params)
            buffers += len(leaves)
            nbytes += sum(leaf.nbytes for leaf in leaves)
            self.released.discard("weights")
        if "kv_cache" in tags and "kv_cache" in self.released:
            for name, pool in self.runner.pools.items():
                pool.allocate()
                buffers += len(jax.tree.leaves(pool.buffers))
                nbytes += pool.nbytes
                if name in self.saved:
                    self.saved[name].restore(self.runner.copiers[name])
            self.saved = {}
            self.released.discard("kv_cache")
        return {"buffers": buffers, "bytes": nbytes}

    def _save(self, name: str) -> Saved:
        kind = self.runner.kind_in(name)
        return Saved.take(self.scheduler.cache.used_pages(kind), self.runner.copiers[name])

    def flush(self) -> None:
        """Forget every cached prefix, those saved on the host too, and what encoders made; no request runs."""
        self._forget_encodings()
        self.settle()
        self.scheduler.cache.flush()
        self.saved = {}

    # -- weights --------------------------------------------------------------------------------------------------

    def update_weights(
        self,
        weights: Weights,
        version: str | None,
        reload: Callable[[], Weights] | None,
        tensors_of: TensorsOf | None = None,
    ) -> tuple[str, list[str]]:
        """Use other weights from the next step on. See ``Engine.update_weights``.

        Returns the version, and the names of parameters that were copied: they lay elsewhere, or are packed here.
        """
        if version is not None:
            check_name("weight_version", version)
        if tensors_of is None:
            placed, copied = self._placed(weights.params) if reload is None else (weights.params, [])
            self._made = []
        else:
            placed, copied = self._repacked(weights.params, tensors_of)
        self.version = version if version is not None else _next_version(self.version)
        self.runner.params = placed
        self.reload = reload
        self.released.discard("weights")
        self._are(weights.identity)
        return self.version, copied

    def _placed(self, params: Params) -> tuple[Params, list[str]]:
        """Weights that were handed over where they are computed with, and the names of those that were copied."""
        leaves = jax.tree_util.tree_leaves_with_path(params)
        check_params(self.runner.placement.model, params)
        dtypes = zip(leaves, self._dtypes, strict=True)
        wrong = [f"{path_name(p)} is {new.dtype}, not {old[0]}" for (p, new), old in dtypes if new.dtype not in old]
        if wrong:
            raise ModelError(f"weights of another dtype: {'; '.join(wrong[:4])}. Cast them, or set dtype to match")
        placed = self.runner.placement.place(params)
        pairs = zip(leaves, _leaves(placed), strict=True)
        return placed, [path_name(path) for (path, new), now in pairs if _is_copy(new, now)]

    def _repacked(self, tree: Any, tensors_of: TensorsOf) -> tuple[Params, list[str]]:
        """Weights made of a trainer's tree, over those that were made before, and the names of all that are no array
        of the tree.
        """
        placement = self.runner.placement
        if tensors_of not in self._repackings:
            self._repackings[tensors_of] = placement.repacking(self.runner.programs.dtype, tensors_of)
        try:
            leaves, made = self._repackings[tensors_of](tree, self._made)
        except BaseException:
            if any(each.is_deleted() for each in self._made):  # they were given up for what did not come
                self._made, self.runner.params = [], {}
                self.released.add("weights")
            raise
        specs = declare(placement.served)
        placed: Params = jax.tree.map(placement.hold, specs, jax.tree.unflatten(jax.tree.structure(specs), leaves))
        self._made = [leaves[i] for i in made] if placement.holding is None else []
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(specs)]
        now = _leaves(placed)
        return placed, [name for i, name in enumerate(names) if i in made or _is_copy(leaves[i], now[i])]

    def _are(self, weights: str) -> None:
        self._forget_encodings()
        self.weights = weights
        self.scheduler.set_epoch(weights)


def _resident_bytes() -> int | None:
    """What of the process is in the machine's memory; None where the system does not say (it does on Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _leaves(params: Params) -> list[Any]:
    """The parameters, a packed one as a whole."""
    return jax.tree.leaves(params, is_leaf=_is_packed)


def _is_packed(weight: object) -> bool:
    return isinstance(weight, Packed)


def _is_copy(new: Any, now: Any) -> bool:
    """Whether a weight that came as ``new`` and is computed with as ``now`` was copied on the way."""
    if new is now:
        return False
    if not (isinstance(new, Array) and isinstance(now, Array)) or new.shape != now.shape:  # as several devices have it
        return True
    return not (new.sharding.is_equivalent_to(now.sharding, now.ndim) and lies_at(new, now.format))


def _next_version(version: str) -> str:
    return str(int(version) + 1) if version.isdecimal() else f"{version}+1"


def read_tags(tags: str | Sequence[str] | None) -> tuple[str, ...]:
    """The tags that a caller named; None means all. Raises ``ConfigError`` for an unknown one."""
    if tags is not None and not isinstance(tags, Sequence):
        raise ConfigError(f"tags must be one or a list of {', '.join(TAGS)}, not {tags!r}")
    chosen = TAGS if tags is None else (tags,) if isinstance(tags, str) else tuple(tags)
    unknown = [tag for tag in chosen if tag not in TAGS]
    if unknown:
        raise ConfigError(f"unknown tag {unknown[0]!r}: choose from {', '.join(TAGS)}")
    return chosen


@dataclass(frozen=True)
class Saved:
    """Pages of one pool that wait in memory taken for the occasion: their numbers, and their images."""

    pages: NDArray[np.int32]
    images: Images

    @classmethod
    def take(cls, pages: NDArray[np.int32], copier: Copier) -> Saved:
        """Copy ``pages``."""
        return cls(pages, read_pages(copier, pages))

    def restore(self, copier: Copier) -> None:
        """Write the pages back where they were."""
        for rows in self.blocks():
            copier.write(self.pages[rows], copier.fetch(self.images, rows))()

    def blocks(self) -> list[NDArray[np.int64]]:
        """The rows, in parts: what is copied lies on the device twice for a while."""
        rows = np.arange(len(self.pages))
        return np.split(rows, range(BLOCKS[-1], len(rows), BLOCKS[-1])) if len(rows) else []
