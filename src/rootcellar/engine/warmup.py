"""Compiling before the first request, and behind the requests while there is nothing else to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from rootcellar.engine.loop import Loop
from rootcellar.runner import CompileCounter
from rootcellar.runner.runner import Program

log = logging.getLogger(__name__)


class WarmUp:
    """The programs of one engine that were not compiled on purpose yet; a request that needs one compiles it itself."""

    def __init__(self, loop: Loop, compiles: CompileCounter) -> None:
        self._loop = loop
        self._compiles = compiles
        runner = loop.machine.runner
        self._left = runner.each_program()
        if loop.machine.life.mover is not None:
            copies = [Program(f"copies of {name}", False, each.compile) for name, each in runner.copiers.items()]
            self._left += copies
        self._of = len(self._left)

    @property
    def left(self) -> int:
        """Programs that were not run yet."""
        return len(self._left)

    def all(self) -> int:
        """Compile what is left, in one go between two steps. Returns compilations."""

        def run() -> int:
            before = self._compiles.count
            while self._left:
                self._next()
            return self._compiles.count - before

        return self._loop.call(run)

    def first(self, tell: Callable[[str], bool]) -> None:
        """Compile what a first request needs, one program at a time.

        ``tell`` is given a line about each before its turn, and says whether to go on.
        """
        needed = sum(program.first for program in self._left)
        for i in range(needed):
            if not tell(f"compiling {i + 1} of {needed}: {self._left[0].name}"):
                return
            self._loop.call(self._next)

    def behind(self) -> None:
        """Compile what is left while the engine has nothing to do: a request waits for one program at most."""
        began, n = time.monotonic(), self.left

        def run() -> None:
            if not self._left:
                return
            program = self._next()
            log.debug("compiled %s", program.name)
            if self._left:
                self._loop.when_idle(run)
            else:
                log.info("compiled: all %d programs that were left, after %.0f seconds", n, time.monotonic() - began)

        if n:
            log.info("ready; %d more programs for longer prompts and more requests are compiled behind the requests", n)
            self._loop.call(lambda: self._loop.when_idle(run))

    def _next(self) -> Program:
        program = self._left.pop(0)
        program.run()
        return program
