"""Makes the commands that add requests, of inputs that were read."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from rootcellar.engine.build import Parts
from rootcellar.engine.clock import Clock
from rootcellar.engine.commands import Submit
from rootcellar.engine.grammar import Grammar
from rootcellar.engine.output import Deliver, Tracker
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

    def _draw_seed(self) -> int:
        """A seed for a request that brought none: a function of random_seed and of how many came before."""
        return int(np.random.SeedSequence([self._parts.config.random_seed, next(self._numbers)]).generate_state(1)[0])
