"""Compiling before the first request, and behind the requests while there is nothing else to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from rootcellar.engine.commands import Compile
from rootcellar.engine.loop import Loop
from rootcellar.runner import CompileCounter

log = logging.getLogger(__name__)


class WarmUp:
    """The programs of one engine that were not compiled on purpose yet; a request that needs one compiles it itself."""

    def __init__(self, loop: Loop, compiles: CompileCounter) -> None:
        self._loop = loop
        self._compiles = compiles
        self._programs = loop.machine.life.programs
        self._next = 0
        """The first that was not run."""

    @property
    def left(self) -> int:
        """Programs that were not run yet."""
        return len(self._programs) - self._next

    def all(self) -> int:
        """Compile what is left, in one go between two steps. Returns compilations."""
        before = self._compiles.count
        self._loop.run(self._some(self.left))
        return self._compiles.count - before

    def first(self, tell: Callable[[str], bool]) -> None:
        """Compile what a first request needs, one program at a time.

        ``tell`` is given a line about each before its turn, and says whether to go on.
        """
        needed = sum(program.first for program in self._programs[self._next :])
        for i in range(needed):
            if not tell(f"compiling {i + 1} of {needed}: {self._programs[self._next].name}"):
                return
            self._loop.run(self._some(1))

    def behind(self) -> None:
        """Compile what is left while the engine has nothing to do: a request waits for one program at most."""
        began, n = time.monotonic(), self.left

        def run() -> None:
            if not self.left:
                return
            name = self._programs[self._next].name
            self._loop.carry_out(self._some(1))
            log.debug("compiled %s", name)
            if self.left:
                self._loop.when_idle(run)
            else:
                log.info("compiled: all %d programs that were left, after %.0f seconds", n, time.monotonic() - began)

        if n:
            log.info("ready; %d more programs for longer prompts and more requests are compiled behind the requests", n)
            self._loop.call(lambda: self._loop.when_idle(run))

    def _some(self, count: int) -> Compile:
        """The command that compiles the next so many."""
        start, self._next = self._next, self._next + count
        return Compile(start, self._next)
