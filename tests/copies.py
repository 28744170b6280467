"""A mover between tiers of a model whose bytes are hashes: it reads when it is told to, and writes when it is let.

Its store is a dict by kind and digest, which a test may take pages from.
"""

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
        self.questions = {}
        self.stored = {}
        self._seen, self._answers = [], []
        self.store = None

    def listen(self, wake):
        """Nothing happens here that nobody let happen."""

    def dispatch(self, moves, *, patient=False):
        for move in moves:
            data = None if move.src is Tier.STORAGE else self._pool_of(move.kind, move.src)[move.src_slots].copy()
            self.pending[move.id] = move, data

    def ask(self, serial, question):
        self.questions[serial] = question

    def attach(self, store):
        self.store = store

    def leave(self):
        """Nothing is under way to a store."""

    def await_left(self, deadline):
        return 0

    def detach(self):
        store, self.store = self.store, None
        return store

    def finish(self, *, ok=True, dst=None):
        """The oldest copy (to ``dst``) comes to its end, well or not; whether there was one."""
        for ident, (move, data) in self.pending.items():
            if dst in (None, move.dst):
                self._seen.append(Done(ident) if ok and self._carry_out(move, data) else Failed(ident))
                del self.pending[ident]
                return True
        return False

    def _carry_out(self, move, data):
        names = [(move.kind, digest) for digest in move.digests]
        if move.dst is Tier.STORAGE:
            self.stored.update(zip(names, data, strict=True))
        elif move.src is not Tier.STORAGE or all(name in self.stored for name in names):
            into = self._pool_of(move.kind, move.dst)
            into[move.dst_slots] = [self.stored[name] for name in names] if data is None else data
        else:
            return False
        return True

    def answer(self, *, ok=True):
        """The oldest question is answered, or the store fails to; whether there was one."""
        for serial, question in self.questions.items():
            held = [ok and page in self.stored for page in question.pages]
            self._answers.append(Answer(serial, tuple(question.answer(held))))
            del self.questions[serial]
            return True
        return False

    def follow(self, events):
        """Let happen what was seen elsewhere; nothing of it is reported."""
        for event in events:
            move, data = self.pending.pop(event.move, (None, None))
            if move is not None and isinstance(event, Done):
                self._pool_of(move.kind, move.dst)[move.dst_slots] = data

    def reports(self):
        seen, self._seen = Reports(tuple(self._seen), tuple(self._answers)), []
        self._answers = []
        return seen

    def stats(self):
        """Nothing that tells how fast it is."""
        nothing = {"bytes": 0.0, "seconds": 0.0, "queued_bytes": 0}
        return {"host-device": nothing, "storage-host": nothing}

    def drain(self, *, near=False):
        while self.finish() or self.answer():
            pass
        return self.reports()


def host_capacity(kinds, tokens, tier=Tier.HOST):
    """Room on HOST, or on another tier, for so many tokens of each kind."""
    return {(kind.name, tier): tokens for kind in kinds}
