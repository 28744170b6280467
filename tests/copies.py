"""A mover between tiers of a model whose bytes are hashes: it reads when it is told to, and writes when it is let."""

from __future__ import annotations

from rootcellar.cache import Answer, Done, Failed, Reports, Tier


class Copies:
    """Copies under way, in order.

    ``pool_of(kind, tier)`` gives the array of a pool, by page. What lies on a tier before it is written cannot be read:
    a source on the device is read at once, as everything else.
    """

    def __init__(self, pool_of):
        self._pool_of = pool_of
        self.pending = {}
        self._seen, self._answers = [], []
        self.store = None

    def listen(self, wake):
        """Nothing happens here that nobody let happen."""

    def dispatch(self, moves, *, patient=False):
        for move in moves:
            self.pending[move.id] = move, self._pool_of(move.kind, move.src)[move.src_slots].copy()

    def ask(self, serial, question):
        self._answers.append(Answer(serial, ()))

    def attach(self, store, most_queued=0):
        self.store = store

    def leave(self):
        """Nothing is under way to a store."""

    def await_left(self, deadline):
        return 0

    def detach(self):
        store, self.store = self.store, None
        return store

    def stats(self):
        return {}

    def finish(self, *, ok=True, dst=None):
        """The oldest copy (to ``dst``) comes to its end, well or not; whether there was one."""
        for ident, (move, data) in self.pending.items():
            if dst in (None, move.dst):
                if ok:
                    self._pool_of(move.kind, move.dst)[move.dst_slots] = data
                self._seen.append(Done(ident) if ok else Failed(ident))
                del self.pending[ident]
                return True
        return False

    def follow(self, events):
        """Let happen what was seen elsewhere; nothing of it is reported."""
        for event in events:
            move, data = self.pending.pop(event.move)
            if isinstance(event, Done):
                self._pool_of(move.kind, move.dst)[move.dst_slots] = data

    def reports(self):
        seen, self._seen = Reports(tuple(self._seen), tuple(self._answers)), []
        self._answers = []
        return seen

    def drain(self):
        while self.finish():
            pass
        return self.reports()


def host_capacity(kinds, tokens):
    """Room on HOST for so many tokens of each kind."""
    return {(kind.name, Tier.HOST): tokens for kind in kinds}
