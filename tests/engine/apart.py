"""A prefill node and a decode node in one process, which meet over the loopback, and requests sent to both."""

import contextlib
import itertools
import threading

import numpy as np
from conversations import tiered
from idle import check_idle

from rootcellar.cache import Done
from rootcellar.engine.identity import namespace

ROOMS = itertools.count(1)


@contextlib.contextmanager
def two_nodes(folder, *, prefill=None, decode=None, **options):
    """Both, as one pair."""
    options = {"disaggregation_bootstrap_port": 0, **options}
    with (
        tiered(folder, **{**options, "disaggregation_mode": "prefill", **(prefill or {})}) as giving,
        tiered(folder, **{**options, "disaggregation_mode": "decode", **(decode or {})}) as taking,
    ):
        yield Pair(giving, taking)


def images(engine, ids, salt):
    """What a device has of a prompt: the bytes of its pages, by kind and name."""
    machine, copiers = engine._loop.machine, engine._parts.runner.copiers

    def look():
        manifest = machine.scheduler.cache.send(machine.scheduler.key(ids, namespace("", salt, "")), 0)
        if manifest is None:
            return {}
        found = {}
        for part in manifest.parts:
            copier = copiers[engine._parts.runner.pool_of[part.kind]]
            rows = np.zeros((len(part.slots), copier.image.nbytes), np.uint8)
            copier.read(np.asarray(part.slots, np.int32), rows, np.arange(len(rows)))()
            found |= {(part.kind, name): row.tobytes() for name, row in zip(part.digests, rows, strict=True)}
        machine.scheduler.learn([Done(manifest.id)])
        return found

    return engine._loop.call(look)


class Pair:
    """Two nodes."""

    def __init__(self, prefill, decode):
        self.prefill, self.decode = prefill, decode

    def where(self, prompts=None):
        """A room for a prompt, or for each of so many, as a router would say it."""
        rooms = next(ROOMS) if prompts is None else [next(ROOMS) for _ in range(prompts)]
        port = self.prefill._parts.peers.port
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": rooms}

    def ask(self, ids, most, first="prefill", **more):
        """What the decode node answers to prompts that the other computes; both say how it ended."""
        return self.ask_both(ids, most, first, **more)[1]

    def ask_both(self, ids, most, first="prefill", **more):
        """What each says. The node called ``first`` hears of it first."""
        where = self.where(len(ids) if isinstance(ids[0], list) else None)
        params = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
        asked = {"input_ids": ids, "sampling_params": params, "raise_on_failure": False, **where, **more}
        engines = [self.prefill, self.decode] if first == "prefill" else [self.decode, self.prefill]
        given = [None, None]
        begun = threading.Event()

        def ask():
            results = engines[0].generate(**asked, stream=True)  # it is there when this returns
            begun.set()
            last = {}
            for result in results:
                last[result.get("index", 0)] = result
            given[0] = [last[i] for i in sorted(last)] if len(last) > 1 else last[0]

        thread = threading.Thread(target=ask)
        thread.start()
        begun.wait()
        given[1] = engines[1].generate(**asked)
        thread.join()
        return given if first == "prefill" else given[::-1]

    @property
    def sent(self):
        """Pages that went over the wire so far, as both count them."""
        gave, took = (engine.stats()["disaggregation"] for engine in (self.prefill, self.decode))
        assert (gave["pages"], gave["bytes"]) == (took["pages"], took["bytes"])
        return took["pages"]

    def same_bytes(self, ids, least, salt=""):
        """Pages of a prompt that were sent and both nodes have on the device, ``least`` at least: bit for bit.

        Pages of a prompt end where its chunks end, or between.
        """
        gave, took = (images(engine, ids[:-1], salt) for engine in (self.prefill, self.decode))
        both = gave.keys() & took.keys()
        assert len(both) >= least, (len(gave), len(took))
        assert [name for name in both if gave[name] != took[name]] == []

    def check_idle(self):
        """Nothing is left behind on either node."""
        for engine in (self.prefill, self.decode):
            stats = engine.stats()
            assert stats["running"] == stats["waiting"] == 0
            check_idle(engine)
