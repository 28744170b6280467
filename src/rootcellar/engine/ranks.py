"""An engine of several ranks: a machine in each process, which do the same, as rank 0 says.

Rank 0 alone has callers. What it is about to do (carry out a command, learn, step) it tells the others first; they do
the same with the same result, since commands are values, reports are agreed on (``agreeing.py``), and what is measured
is rank 0's. So all plan the same steps, which their devices compute together. Each step is told with a digest of all
steps and commands before it: ranks that part find out at once.

A step that fails ends the engine, since nobody knows how far the other ranks came.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import partial
from typing import Any
from zlib import crc32

from rootcellar.cache import digests
from rootcellar.config import EngineConfig
from rootcellar.engine.agreeing import AgreedMover, Unopened
from rootcellar.engine.build import Parts, folder_of, load_weights
from rootcellar.engine.clock import Clock
from rootcellar.engine.commands import Attach, Command, Detach, Submit, UpdateWeights
from rootcellar.engine.exchange import Exchange
from rootcellar.engine.lifecycle import Lifecycle
from rootcellar.engine.loop import Loop
from rootcellar.engine.output import Tracker
from rootcellar.engine.sides import side_of
from rootcellar.engine.step import AnyCommand, Chosen, Launched, Machine
from rootcellar.errors import ConfigError, EngineError, RootcellarError
from rootcellar.runner import Unread
from rootcellar.scheduler import Plan, Rates
from rootcellar.tiers.prefetching import PrefetchSettings
from rootcellar.tiers.settings import read_extra
from rootcellar.tiers.store import Store, WrittenElsewhere
from rootcellar.tiers.stores import open_store

log = logging.getLogger(__name__)

OWN = frozenset(
    {
        "model_path",
        "node_rank",
        "compilation_cache_dir",
        "hicache_storage_backend",
        "hicache_storage_backend_extra_config",
        "log_level",
        "log_interval",
        "record_trace",
    }
)
"""Settings that each rank may have its own of."""
_MOMENT = 0.5
"""Seconds in which a lost rank is noticed here once the devices noticed."""


@dataclass(frozen=True)
class Do:
    """Carry out a command."""

    command: Command


@dataclass(frozen=True)
class Look:
    """Agree on what movers saw, and learn it; ``rates`` and ``now``: as in ``Learn``."""

    rates: Rates
    now: float


@dataclass(frozen=True)
class Step:
    """Try a step; ``digest``: of all steps before it."""

    digest: int


class RankedMachine(Machine):
    """The machine of one rank. ``digest``: of what it did and planned and what came of it, so far."""

    def __init__(self, life: Lifecycle, exchange: Exchange, **options: Any) -> None:
        """``options``: as for any machine."""
        self.agreed = None if life.mover is None else AgreedMover(life.mover, exchange)
        life.mover = self.agreed
        super().__init__(life, **options)
        self.exchange = exchange
        self.digest = 0

    def recover(self, error: Exception) -> None:
        """It cannot: the other ranks are told, and ``EngineError`` is raised."""
        # Where another rank died the devices may notice first, in words that say less.
        why = self.exchange.ended(_MOMENT)
        if not why:
            what = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            why = f"rank {self.exchange.rank} of {self.exchange.ranks} failed: {what}"
            self.exchange.close(why)
        raise EngineError(why) from error

    def _carry_out(self, command: AnyCommand, reply: Future[Any], live: tuple[Any, ...]) -> None:
        super()._carry_out(command, reply, live)
        error = reply.exception()
        if error is not None and not isinstance(error, RootcellarError):
            raise error  # perhaps here alone, and others wait for this rank to agree with them
        # What is refused may be so on one rank alone, and weights that are read again may be others there.
        self._note((type(command).__name__, type(error).__name__, self.life.weights))

    def _run(self, plan: Plan, before: Unread | None) -> Launched:
        self._note([(c.request.rid, c.start, c.stop) for c in plan.chunks])
        return super()._run(plan, before)

    def _follow_up(self, launched: Launched, chosen: Chosen, trackers: dict[int, Tracker]) -> None:
        self._note(chosen.tokens)
        super()._follow_up(launched, chosen, trackers)

    def _note(self, what: object) -> None:
        self.digest = crc32(repr(what).encode(), self.digest)


class LeadingMachine(RankedMachine):
    """That of rank 0: it tells the others before it does anything."""

    def do(self, command: AnyCommand, reply: Future[Any], *live: Any) -> None:
        """See ``Machine``. ``EngineError`` at once where a command cannot be told."""
        if isinstance(command, Command):
            self.exchange.lead(Do(command))
        super().do(command, reply, *live)

    def learn(self) -> None:
        """See ``Machine``; where a rank has seen something."""
        if self.agreed is not None and (self.agreed.take_news() or self.life.missed):
            rates, now = self.measured()
            self.exchange.lead(Look(rates, now))
            if reports := self.life.missed + self.agreed.reports():
                self.learn_of(reports, rates, now)

    def step(self) -> None:
        """See ``Machine``."""
        self.exchange.lead(Step(self.digest))
        super().step()


class FollowingMachine(RankedMachine):
    """That of another rank: it does what it is told, and its answers go to nobody."""

    def __init__(self, life: Lifecycle, exchange: Exchange, live: Callable[[Command], tuple[Any, ...]], **options: Any):
        """``live``: what is handed over with a command, and is no data; made here."""
        super().__init__(life, exchange, **options)
        self._live = live

    def follow(self, told: Do | Look | Step) -> None:
        """Do the same. ``EngineError``: this rank does not do the same."""
        match told:
            case Do(command):
                reply: Future[Any] = Future()
                live = self._live(command)
                reply.add_done_callback(lambda done: _done(command, live, done))
                self.do(command, reply, *live)
            case Look(rates, now):
                assert self.agreed is not None
                if reports := self.life.missed + self.agreed.reports():
                    self.learn_of(reports, rates, now)
            case Step(digest):
                if digest != self.digest:
                    raise EngineError(
                        f"rank {self.exchange.rank} parted from rank 0 before turn {self.turns}: they did, planned or "
                        "chose something else"
                    )
                self.step()


def _done(command: Command, live: tuple[Any, ...], reply: Future[Any]) -> None:
    """A store that was let go, or not taken, is closed. Rank 0 tells its caller what went wrong."""
    failed = reply.exception() is not None
    if isinstance(command, Detach) and not failed and reply.result() is not None:
        reply.result().close()
    if isinstance(command, Attach) and failed and not isinstance(live[0], Unopened):
        live[0].close()


class FollowingLoop(Loop):
    """The loop of a rank that follows: it does what it is told when it is told, and nothing else."""

    machine: FollowingMachine

    def post(self, _command: Command, *_live: Any) -> Future[Any]:
        """Refused with ``EngineError``."""
        rank = self.machine.exchange.rank
        raise EngineError(f"this is rank {rank} of an engine, which does as rank 0 does: ask that one")

    def take(self, told: Do | Look | Step) -> None:
        """Do this after all that was told before, unless it is over then; from any thread."""
        self._inbox.put(lambda: None if self._stopped.is_set() else self.machine.follow(told))

    def _turn(self) -> None:
        self._drain(wait=True)

    def _alarm(self) -> float | None:
        return None

    def _expire(self) -> None:
        """Rank 0 says what is late."""


def loop_of(parts: Parts, exchange: Exchange | None, **options: Any) -> Loop:
    """The running loop of an engine, alone (None) or as one rank of several. ``options``: of its machine.

    Raises ``ConfigError``: ranks are not alike.
    """
    life = Lifecycle.of(parts)
    names_of = partial(digests, page_size=parts.config.page_size, fingerprint=parts.fingerprint)
    options |= {"prefetcher": parts.prefetcher, "trace": parts.trace}
    options["tell"] = None if parts.events is None else parts.events.publish
    options["side"] = side_of(parts.config, parts.peers, names_of)
    if exchange is None:
        return Loop(Machine(life, **options))
    require_same(exchange, parts)
    if exchange.rank == 0:
        leading = LeadingMachine(life, exchange, **options)
        loop = Loop(leading)

        def news() -> None:
            if leading.agreed is not None:
                leading.agreed.noted()
                loop.wake()

        exchange.listen(led=_nobody, news=news, lost=loop.fail)
        return loop
    machine = FollowingMachine(life, exchange, Live(parts, options["clock"]), **options)
    following = FollowingLoop(machine)
    exchange.listen(led=following.take, news=_nothing, lost=following.fail)
    return following


class Live:
    """What goes with commands on a rank that follows: it opens its own store and loads its own weights."""

    def __init__(self, parts: Parts, clock: Clock) -> None:
        self._parts = parts
        self._clock = clock

    def __call__(self, command: Command) -> tuple[Any, ...]:
        """See ``FollowingMachine``."""
        match command:
            case Submit():
                parts, wanted = self._parts, [item.sampling for item in command.items]
                compiling = None if parts.grammars is None else parts.grammars.start(wanted)
                grammars = None if compiling is None else compiling.result()
                return (command.trackers(parts.tokenizer, self._clock, grammars, lambda _: _nobody),)
            case Attach():
                return (self._open(command),)
            case UpdateWeights():
                assert command.path is not None
                weights = load_weights(folder_of(command.path), self._parts)
                if weights.identity != command.identity:
                    raise EngineError(f"{command.path} holds other weights than on rank 0")
                return weights, lambda: load_weights(folder_of(str(command.path)), self._parts)
            case _:
                return ()

    def _open(self, command: Attach) -> Store | Unopened:
        """Its own store where it has settings of its own, else as rank 0; a folder that another writes in is read."""
        backend, settings = command.backend, dict(command.settings)
        own = self._parts.config.hicache_storage_backend
        if own is not None:
            backend, settings = own, _own_settings(self._parts.config)
        try:
            return open_store(backend, settings, self._parts.identity)
        except ConfigError as error:
            why = str(error)
        try:
            return WrittenElsewhere(open_store(backend, {**settings, "read_only": True}, self._parts.identity))
        except ConfigError:
            return Unopened(why)


def _own_settings(config: EngineConfig) -> dict[str, object]:
    return PrefetchSettings.split(read_extra(config.hicache_storage_backend_extra_config))[1]


def _nobody(_: object) -> None:
    """Nobody is there for an answer."""


def _nothing() -> None:
    """Only rank 0 is told of news."""


def require_same(exchange: Exchange, parts: Parts) -> None:
    """Raise ``ConfigError`` on all ranks where the engines that were built differ in what must be equal."""
    config = parts.config
    mine: dict[str, object] = {
        each.name: getattr(config, each.name) for each in fields(EngineConfig) if each.name not in OWN
    }
    mine |= {
        "the model": parts.fingerprint.hex(),
        "the weights (weights_name)": parts.weights,
        "pages (max_total_tokens)": {name: pool.pages for name, pool in parts.runner.pools.items()},
        "host pages (hicache_ratio, hicache_size)": {}
        if parts.host is None
        else {name: len(images) for name, images in parts.host.images.items()},
        "a tokenizer": parts.tokenizer is not None,
        "max_running_requests": parts.max_running_requests,
        "context_length": parts.context_length,
    }
    if exchange.rank:
        exchange.say(mine)
        differs = exchange.hear()
    else:
        others = exchange.gather()
        differs = "; ".join(found for i, theirs in enumerate(others, 1) if (found := _differences(mine, theirs, i)))
        exchange.tell(differs)
    if differs:
        raise ConfigError(f"the ranks of an engine must be alike: {differs}")


def _differences(mine: Mapping[str, object], theirs: Mapping[str, object], rank: int) -> str:
    return "; ".join(
        f"{name} is {value!r} on rank 0 and {theirs.get(name)!r} on rank {rank}"
        for name, value in mine.items()
        if theirs.get(name) != value
    )
