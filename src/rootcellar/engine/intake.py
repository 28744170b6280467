"""Makes the commands that add requests, of inputs that were read."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np

from rootcellar.engine.build import Parts
from rootcellar.engine.clock import Clock
from rootcellar.engine.commands import Submit
from rootcellar.engine.grammar import Grammar
from rootcellar.engine.loop import Loop
from rootcellar.engine.output import Deliver, RequestOutput, Tracker, show
from rootcellar.engine.requests import Inputs


class Intake:
    """That of one engine: its calls and its draws of seeds are counted here. For any thread."""

    def __init__(self, parts: Parts, clock: Clock) -> None:
        self._parts = parts
        self._clock = clock
        self._numbers = itertools.count()
        self._calls = itertools.count()

    def grammars(self, inputs: Inputs) -> Future[list[Grammar | None]] | None:
        """What the sequences' answers must follow, once it is compiled; None without a tokenizer."""
        made = self._parts.grammars
        return None if made is None else made.start([item.sampling for item in inputs.items])

    def submit(self, inputs: Inputs, stream: bool) -> Submit:
        """The command that adds these sequences, each with its seed and its names."""
        timeout = self._parts.config.request_timeout
        items = tuple(
            replace(
                item,
                seed=self._draw_seed() if item.seed is None else item.seed,
                names=item.names or (uuid.uuid4().hex,),
            )
            for item in inputs.items
        )
        deadline = None if timeout is None else self._clock.now() + timeout
        return Submit(items, next(self._calls), inputs.tenant, stream, inputs.received, deadline)

    def trackers(
        self, submit: Submit, grammars: Sequence[Grammar | None] | None, deliver_to: Callable[[int], Deliver]
    ) -> list[Tracker]:
        """What follows the sequences of a command, in their order."""
        return submit.trackers(self._parts.tokenizer, self._clock, grammars, deliver_to)

    def run(self, loop: Loop, inputs: Inputs, stream: bool, *, strict: bool) -> Iterator[dict[str, Any]]:
        """Add these sequences, and give what comes of them as their caller sees it.

        Leaving it early ends the requests. ``strict``: an answer that failed raises.
        """
        updates: SimpleQueue[tuple[int, RequestOutput]] = SimpleQueue()
        compiling = self.grammars(inputs)
        grammars = None if compiling is None else compiling.result()
        submit = self.submit(inputs, stream)
        loop.run(submit, self.trackers(submit, grammars, lambda i: lambda output: updates.put((i, output))))
        results = _received(loop, updates, submit, indexed=inputs.several, strict=strict)
        next(results)
        return results

    def _draw_seed(self) -> int:
        """A seed for a request that brought none: a function of random_seed and of how many came before."""
        return int(np.random.SeedSequence([self._parts.config.random_seed, next(self._numbers)]).generate_state(1)[0])


def _received(
    loop: Loop, updates: SimpleQueue[tuple[int, RequestOutput]], submit: Submit, *, indexed: bool, strict: bool
) -> Iterator[dict[str, Any]]:
    left = len(submit.items)
    try:
        yield {}  # begun: only then does leaving it, before the first result too, end the requests
        while left:
            index, output = updates.get()
            left -= output.finish is not None
            yield show(output, index if indexed else None, strict)
    finally:
        if left:
            loop.abandon(submit.call)
