"""What changes an engine's state between two steps, as values: to be logged, replayed, or sent to others.

A command holds all that it needs as plain data. What cannot be data is handed to :meth:`run` beside it: where the
answers go, arrays that somebody holds. Whoever only wants to read hands the loop a function instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from rootcellar.cache import Tier
from rootcellar.engine.build import Weights
from rootcellar.engine.clock import Clock
from rootcellar.engine.copies import AnyMover
from rootcellar.engine.grammar import Grammar
from rootcellar.engine.hints import Reply
from rootcellar.engine.output import Deliver, Tracker
from rootcellar.engine.pins import Sort
from rootcellar.engine.requests import InputItem
from rootcellar.engine.routing import Routed
from rootcellar.engine.step import Machine
from rootcellar.errors import CacheBusy, ConfigError
from rootcellar.models.repacking import TensorsOf
from rootcellar.scheduler import Finish, PrefetchPolicy, PrefetchRules, Request
from rootcellar.text import Tokenizer
from rootcellar.tiers.prefetching import PrefetchSettings
from rootcellar.tiers.store import Store

# Requests of an abandoned call that are ended between two steps: a millisecond or two.
_SLICE = 32

MODES = ("wait", "abort", "retract")
PAUSES = ("abort", "retract", "in_place")
UPDATES = ("keep", "recompute")


@dataclass(frozen=True)
class Command(ABC):
    """Something to be done between two steps.

    ``rest``: None when it may be done whatever runs; else no request may run, and it says what becomes of those that
    do: ``"wait"`` until they end (waiting ones go on waiting), ``"retract"``: they wait again, with what they have,
    ``"abort"``: they and all that wait end.
    """

    @property
    def rest(self) -> str | None:
        """See above."""
        return None

    @abstractmethod
    def run(self, machine: Machine, *live: Any) -> Any:
        """Do it; the result is its caller's. ``live``: what is no data."""


# -- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submit(Command):
    """Add the sequences of one call, all of them or none; each of ``items`` has its seed and its names.

    ``received``, ``deadline``: when the call came, and when it is too late, in seconds of the engine's clock.
    """

    items: tuple[InputItem, ...]
    call: int
    tenant: str
    stream: bool
    received: float
    deadline: float | None

    def trackers(
        self,
        tokenizer: Tokenizer | None,
        clock: Clock,
        grammars: Sequence[Grammar | None] | None,
        deliver_to: Callable[[int], Deliver],
    ) -> list[Tracker]:
        """What follows the items, in their order; ``deliver_to(i)`` takes the outputs of item ``i``."""
        made = []
        for i, item in enumerate(self.items):
            start = None if item.logprobs is None else item.logprobs.start
            request = Request.new(
                item.names[-1],
                item.ids,
                item.sampling,
                stop_ids=item.stop_ids,
                namespace=item.namespace,
                priority=item.priority,
                score_from=None if start is None else max(start - 1, 0),
                tenant=self.tenant,
                call=self.call,
                guessable=grammars is None or grammars[i] is None,
                bound=item.sampling.penalized or (grammars is not None and grammars[i] is not None),
                checkpoint=item.checkpoint,
                depends=item.depends,
                room=item.room,
                gives=item.gives,
                spans=item.spans,
                places=item.places,
            )
            assert item.seed is not None
            tracker = Tracker(
                request,
                deliver_to(i),
                tokenizer=tokenizer,
                stream=self.stream,
                logprobs=item.logprobs,
                deadline=self.deadline,
                seed=item.seed,
                received=self.received,
                clock=clock,
                names=item.names,
                grammar=None if grammars is None else grammars[i],
                experts=None if item.experts_from is None else Routed(item.experts_from),
            )
            made.append(tracker)
        return made

    def run(self, machine: Machine, trackers: Sequence[Tracker]) -> None:
        """``trackers`` follow the items, in their order."""
        machine.life.require_memory()
        machine.places.require(self.tenant, len(trackers))
        machine.peers.require([tracker.request for tracker in trackers])
        machine.roster.add(self.call, trackers)
        for tracker in trackers:
            machine.scheduler.add(tracker.request)
            if tracker.request.room is None:
                machine.prefetcher.arrived(tracker.request, self.received)
            else:
                machine.peers.arrived(tracker.request, self.received)


@dataclass(frozen=True)
class Abandon(Command):
    """End requests of a call whose caller went away: some of a large one, so that others have a turn."""

    call: int

    def run(self, machine: Machine) -> bool:
        """Whether some are left. Those that run end first: others wait for their place."""
        alive = sorted(machine.roster.of_call(self.call), key=lambda tracker: tracker.request.lease is None)
        machine.end_all(alive[:_SLICE], Finish.abort("gone", "the caller went away"))
        return len(alive) > _SLICE


@dataclass(frozen=True)
class Abort(Command):
    """End what goes by the name ``rid``, of a tenant or (None) of all."""

    rid: str
    tenant: str | None
    message: str

    def run(self, machine: Machine) -> int:
        """How many requests that were."""
        return machine.end_all(machine.roster.named(self.rid, self.tenant), Finish.abort("asked", self.message))


@dataclass(frozen=True)
class AbortAll(Command):
    """End every request. ``cause``: as in ``Finish``."""

    message: str
    cause: str

    def run(self, machine: Machine) -> int:
        """How many there were."""
        return machine.end_all(machine.roster.of(None), Finish.abort(self.cause, self.message))


@dataclass(frozen=True)
class Expire(Command):
    """End what is late at ``now``: requests, pins, and the waiting for a store or another node.

    ``longest``: see :class:`Hint`.
    """

    now: float
    longest: float = inf

    def run(self, machine: Machine) -> None:
        """See above."""
        late = Finish.abort("timeout", "timed out: it took longer than request_timeout")
        machine.end_all(machine.roster.late(self.now), late)
        machine.pins.expire(self.now)
        machine.hints.expire(self.now, self.longest)
        machine.prefetcher.expire(self.now)
        machine.peers.expire(self.now)


@dataclass(frozen=True)
class Desert(Command):
    """Nobody will come to ``rooms``: those who wait there are told ``why``."""

    rooms: frozenset[int]
    why: str

    def run(self, machine: Machine) -> int:
        """How many requests waited there."""
        return machine.peers.desert(self.rooms, self.why)


# -- the cache --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flush(Command):
    """Forget every cached prefix. See ``Engine.flush_cache``."""

    def run(self, machine: Machine) -> None:
        """See above."""
        machine.require_nothing_computed("flush_cache")
        machine.life.flush()
        if machine.scheduler.guesses is not None:
            machine.scheduler.guesses.forget()
        machine.pins.forget()
        machine.recorder.explainer.forgotten()


@dataclass(frozen=True)
class Pin(Command):
    """Keep what is cached of these tokens until ``ends``. See ``Prefixes.pin`` and ``Prefixes.keep``."""

    ids: tuple[int, ...]
    namespace: str
    tenant: str
    ends: float
    share: float
    sort: Sort = "pin"

    def run(self, machine: Machine) -> tuple[int, int]:
        """Tokens that are pinned, and the tenant's pins."""
        key = machine.scheduler.key(self.ids, self.namespace)
        return machine.pins.add(self.tenant, key, self.ends, self.share, sort=self.sort)


@dataclass(frozen=True)
class Hint(Command):
    """What a tenant says of the future of these tokens. See ``Prefixes.hint``; ``hints`` are checked.

    ``longest``: seconds for which it paid by ``now`` to keep what is surely asked for (``Demand``).
    """

    ids: tuple[int, ...]
    namespace: str
    tenant: str
    hints: Mapping[str, float]
    share: float
    now: float
    longest: float = inf

    def run(self, machine: Machine) -> list[Reply]:
        """An answer to each."""
        key = machine.scheduler.key(self.ids, self.namespace)
        return machine.hints.take(self.tenant, key, self.hints, self.share, self.now, self.longest)


@dataclass(frozen=True)
class Unpin(Command):
    """Undo a tenant's pin of exactly these tokens."""

    ids: tuple[int, ...]
    namespace: str
    tenant: str

    def run(self, machine: Machine) -> bool:
        """Whether there was one."""
        return machine.pins.remove(self.tenant, machine.scheduler.key(self.ids, self.namespace))


# -- the store behind the host ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attach(Command):
    """Keep pages in a store that is called ``backend``, and look there for the prompts of new requests.

    ``settings``: the store's own.
    """

    backend: str
    policy: PrefetchPolicy
    prefetch: PrefetchSettings
    settings: Mapping[str, Any] = field(repr=False)  # there may be secrets in them

    def run(self, machine: Machine, store: Store) -> None:
        """Use ``store``, which is open."""
        _mover_of(machine).attach(store)
        machine.scheduler.cache.write_to(Tier.STORAGE, True)
        machine.recorder.meter.other_store()
        machine.prefetcher.open(PrefetchRules(self.policy, self.prefetch.threshold, self.prefetch.timeout))


@dataclass(frozen=True)
class Leave(Command):
    """Give nothing more to the store, nor wait for it; what is under way goes on."""

    def run(self, machine: Machine) -> None:
        """See above."""
        machine.scheduler.cache.write_to(Tier.STORAGE, False)
        _mover_of(machine).leave()
        machine.prefetcher.close()


@dataclass(frozen=True)
class Detach(Command):
    """Forget what the store holds, which keeps it."""

    def run(self, machine: Machine) -> Store | None:
        """The store; None while copies to or from it are under way."""
        try:
            machine.scheduler.cache.forget_tier(Tier.STORAGE)
            return _mover_of(machine).detach()
        except CacheBusy:
            return None


@dataclass(frozen=True)
class Save(Command):
    """Write to the store what only the device or the host holds."""

    @property
    def rest(self) -> str:
        """What runs is not waited for: the engine is about to end."""
        return "abort"

    def run(self, machine: Machine) -> None:
        """In turns, where the host is too small for all of it at once; until a turn adds nothing."""
        cache, before, stored = machine.scheduler.cache, -1, 0
        while before < stored:
            before = stored
            cache.save(Tier.STORAGE)
            machine.life.settle()
            stored = sum(shelf.used for (_, tier), shelf in cache.stats().shelves.items() if tier is Tier.STORAGE)


# -- the engine -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pause(Command):
    """Compute nothing from now on. See ``Engine.pause_generation``."""

    mode: str

    def __post_init__(self) -> None:
        _one_of(self.mode, PAUSES)

    @property
    def rest(self) -> str | None:
        """What runs stays as it is, or makes way."""
        return None if self.mode == "in_place" else self.mode

    def run(self, machine: Machine) -> None:
        """See above."""
        machine.paused = True


@dataclass(frozen=True)
class Continue(Command):
    """Undo :class:`Pause`."""

    def run(self, machine: Machine) -> None:
        """See above."""
        machine.paused = False


@dataclass(frozen=True)
class Release(Command):
    """Give memory back. See ``Engine.release_memory_occupation``."""

    tags: tuple[str, ...]
    mode: str
    preserve: bool
    clear_compiled: bool

    def __post_init__(self) -> None:
        _one_of(self.mode, MODES)

    @property
    def rest(self) -> str:
        """No request may run."""
        return self.mode

    def run(self, machine: Machine) -> dict[str, Any]:
        """What was given back."""
        if not self.preserve and "kv_cache" in self.tags:
            machine.recorder.explainer.forgotten()
        if "kv_cache" in self.tags:
            machine.peers.forget_device()
        released = machine.life.release(self.tags, self.preserve, self.clear_compiled)
        if "kv_cache" in self.tags:
            machine.pins.forget()
        return released


@dataclass(frozen=True)
class Resume(Command):
    """Take memory again. See ``Engine.resume_memory_occupation``."""

    tags: tuple[str, ...]

    def run(self, machine: Machine) -> dict[str, Any]:
        """What was taken."""
        resumed = machine.life.resume(self.tags)
        machine.pins.forget()  # of what the weights that are read again may not have computed
        return resumed


@dataclass(frozen=True)
class Compile(Command):
    """Compile programs, those from ``start`` up to ``stop`` in the order of ``Lifecycle.programs``."""

    start: int
    stop: int

    def run(self, machine: Machine) -> None:
        """By running them on padding."""
        for program in machine.life.programs[self.start : self.stop]:
            program.run()


@dataclass(frozen=True)
class UpdateWeights(Command):
    """Use other weights from the next step on. See ``Engine.update_weights``.

    ``identity``: what they are, in a word. ``path``: the folder that they come from; None: they were handed over.
    """

    identity: str
    version: str | None
    path: str | None = None
    on_weight_update: str = "keep"

    def __post_init__(self) -> None:
        if self.on_weight_update not in UPDATES:
            raise ConfigError(
                f"on_weight_update={self.on_weight_update!r} is unknown: choose from {', '.join(UPDATES)}"
            )

    @property
    def rest(self) -> str | None:
        """What runs keeps its KV, or has it computed anew."""
        return "retract" if self.on_weight_update == "recompute" else None

    def run(
        self,
        machine: Machine,
        weights: Weights,
        reload: Callable[[], Weights] | None,
        tensors_of: TensorsOf | None = None,
    ) -> tuple[str, list[str]]:
        """The version, and which parameters were copied.

        ``weights``: those meant; ``reload`` gives them again; ``tensors_of`` reads them where they are in another form.
        """
        before = machine.life.version
        updated = machine.life.update_weights(weights, self.version, reload, tensors_of)
        for request in machine.scheduler.running:
            machine.trackers[request].kept_kv(before)
        machine.pins.forget()
        return updated


def _mover_of(machine: Machine) -> AnyMover:
    assert machine.life.mover is not None, "a store needs the host's memory"
    return machine.life.mover


def _one_of(mode: str, modes: tuple[str, ...]) -> None:
    if mode not in modes:
        raise ConfigError(f"mode={mode!r} is unknown: choose from {', '.join(modes)}")
