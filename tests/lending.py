"""Two processes at the ends of a wire, for every one that there is; run as a program, one that lends.

python lending.py WIRE SEED...  >  the wire's address and a ticket for the bytes of each seed, as JSON; until input ends
"""

import base64
import contextlib
import json
import subprocess
import sys
import time

import numpy as np

from rootcellar.transfer.wires import open_wire

SIZE = 1 << 20
DEADLINE = 2.0


def content(seed):
    return np.random.default_rng(seed).integers(256, size=SIZE + seed, dtype=np.uint8)


@contextlib.contextmanager
def lender(wire, seeds):
    """Another process that lends: it, its address, and the tickets."""
    words = [sys.executable, __file__, wire, *map(str, seeds)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):  # libraries say things, too
                said = json.loads(line)
                yield process, said["address"], [base64.b64decode(ticket) for ticket in said["tickets"]]
                break
        process.kill()


def check(name):
    """What one process lends another fetches; one that is gone costs no more than the deadline."""
    wire, seeds = open_wire(name, "127.0.0.1", 4 * SIZE), [1, 2, 3]
    with lender(name, seeds) as (process, address, tickets):
        for seed, ticket in zip(seeds, tickets, strict=True):
            with wire.fetch(address, ticket, SIZE + seed, 10 * DEADLINE) as found:
                assert np.array_equal(found, content(seed))
        assert not wire.lent
        process.kill()
        process.wait()
        began = time.monotonic()
        try:
            with wire.fetch(address, tickets[0], SIZE + 1, DEADLINE):
                raise AssertionError("whoever lent it is gone")
        except OSError as error:
            print(f"{name}: {error}")
        assert time.monotonic() - began < DEADLINE + 3
    with lender(name, seeds) as (process, address, tickets), wire.fetch(address, tickets[2], SIZE + 3, 10) as found:
        assert np.array_equal(found, content(3))
    lends_what_it_has_room_for(wire)
    wire.close()


def lends_what_it_has_room_for(wire):
    tickets = [wire.lend(content(0), 0) for _ in range(4)]
    if wire.lent == 4 * SIZE:  # no read that is late has a part of it
        assert None not in tickets
    assert wire.lend(content(0), 0.01) is None
    wire.withdraw(tickets[1])
    again = wire.lend(content(0), 0)
    assert again is not None
    for ticket in [tickets[0], again, *tickets[2:]]:
        if ticket is not None:
            wire.withdraw(ticket)


def main(name, *seeds):
    wire = open_wire(name, "127.0.0.1", 4 * SIZE)
    tickets = [base64.b64encode(wire.lend(content(int(seed)), 0)).decode() for seed in seeds]
    print(json.dumps({"address": wire.address, "tickets": tickets}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
