"""Run by nodes.py: a prefill or decode node with its server, in a process that may be killed or stopped.

python node.py SETTINGS  <  a line for each wish  >  "node: " and its answer as JSON; the first says that it is ready

SETTINGS is JSON: ``engine`` for ``Engine``, ``server`` for its server. A wish is ``pages`` (that went over the wire),
``left`` (what is held by nobody's request once it is at rest; raises where the cache is not whole), or ``wire SEED CUT
CORRUPT HANG`` (how likely each is, from the next connection on).
"""

import json
import sys

import rootcellar
from rootcellar.scheduler import Rates
from rootcellar.transfer.faulty import FaultyWires, WireFaults
from serving import on_thread


def left(engine):
    """What is not as it should be at rest, by name; empty: nothing."""
    stats = engine.stats()
    peers = stats["disaggregation"]
    found = {name: stats[name] for name in ("running", "waiting")}
    found |= {name: peers[name] for name in ("open_rooms", "waiting") if name in peers}
    wire = engine._parts.peers._wire
    found["lent"] = 0 if wire is None else wire.lent
    found |= {f"{lane} queued": counts.get("queued_bytes", 0) for lane, counts in stats["copies"].items()}
    if not any(found.values()):
        engine._loop.call(engine._loop.machine.life.settle)
        engine.check()
        for kind, tiers in engine.stats()["cache"].items():
            for tier, shelf in tiers.items():
                found |= {f"{kind} {tier} {name}": shelf[name] for name in ("pinned", "leased")}
                found[f"{kind} {tier} lost"] = shelf["used"] - shelf["cached"]
    return {name: value for name, value in found.items() if value}


def main():
    settings = json.loads(sys.argv[1])
    options = {"skip_tokenizer_init": True, "max_total_tokens": 512, "max_running_requests": 2}
    options |= {"chunked_prefill_size": 64, **settings["engine"]}
    with rootcellar.Engine(**options) as engine, on_thread(engine, **settings["server"]):
        # So small a model computes sooner than it loads: let nothing be measured, and all is loaded.
        engine._loop.machine.recorder.meter.rates = lambda stats, now: Rates()
        params = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
        engine.generate(input_ids=list(range(1, 80)), cache_salt="warm", sampling_params=params)
        print("node: " + json.dumps("ready"), flush=True)
        for line in sys.stdin:
            match line.split():
                case ["pages"]:
                    said = engine.stats()["disaggregation"]["pages"]
                case ["left"]:
                    said = left(engine)
                case ["wire", seed, *likely]:
                    cut, corrupt, hang = map(float, likely)
                    faults = WireFaults(delay=0.05, cut=cut, corrupt=corrupt, hang=hang)
                    engine._parts.peers._wrap = FaultyWires(faults, int(seed))
                    said = "wired"
            print("node: " + json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
