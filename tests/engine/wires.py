"""Ranks of one process: an exchange without sockets, which may be slow, lose its words and die, by a seed."""

import queue
import threading
import time

import numpy as np

from rootcellar.errors import EngineError


class Wires:
    """The exchange of each rank of an engine, ``ends[rank]``.

    ``delay``: seconds that a word may take at most. ``copy``: what is said is sent so, as by a wire.
    """

    def __init__(self, ranks, seed=0, delay=0.0, copy=lambda what: what):
        self.delay = delay
        self.copy = copy
        self.why = ""
        self.over = threading.Event()
        self.led = [queue.SimpleQueue() for _ in range(ranks)]
        self.said = [queue.SimpleQueue() for _ in range(ranks)]
        self.told = [queue.SimpleQueue() for _ in range(ranks)]
        self.words = 0
        self.ends = [_End(self, rank, ranks, np.random.default_rng([seed, rank])) for rank in range(ranks)]

    def end(self, why):
        """It is over for all."""
        self.why = self.why or why
        self.over.set()
        for each in (*self.led, *self.said, *self.told):
            each.put(None)


class _End:
    def __init__(self, wires, rank, ranks, rng):
        self.rank, self.ranks = rank, ranks
        self._wires, self._rng = wires, rng

    def _send(self, queues, what):
        self._wires.words += 1
        if self._wires.delay:
            time.sleep(self._wires.delay * self._rng.random())
        for each in queues:
            each.put((self._wires.copy(what),))

    def _take(self, one):
        found = None if self._wires.over.is_set() else one.get()
        if found is None:
            raise EngineError(self._wires.why)
        return found[0]

    def lead(self, what):
        self._send(self._wires.led[1:], what)

    def next_led(self):
        """What rank 0 leads next."""
        return self._take(self._wires.led[self.rank])

    def gather(self):
        return [self._take(each) for each in self._wires.said[1:]]

    def tell(self, what):
        self._send(self._wires.told[1:], what)

    def say(self, what):
        self._send([self._wires.said[self.rank]], what)

    def hear(self):
        return self._take(self._wires.told[self.rank])

    def news(self):
        """Rank 0 looks at every turn."""

    def ended(self, within):
        return self._wires.why

    in_order = False

    def close(self, why, in_order=False):
        self._wires.end(why)
