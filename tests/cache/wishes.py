"""What an operator wishes of the world's cache: pins, namespaces, tiers, prefetches and peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rootcellar.cache import NEVER, Done, Failed, Key, Manifest, Tier
from rootcellar.errors import CacheBusy, ConfigError

if TYPE_CHECKING:
    from world import World


def control(world: World) -> None:
    """One of the operator's wishes."""
    pick, cache = world.pick, world.cache
    wish = pick(14)
    name, tokens = world.prompts[pick(len(world.prompts))] if world.prompts else ("", [0])
    key = Key(tokens, name)
    if wish == 0:
        cache.pin(key, 1 + pick(8))
    elif wish == 1:
        cache.unpin(key)
    elif wish == 2 and pick(3) == 0:
        cache.drop_namespace(name)
        assert not cache.match(key).branch
    elif wish == 3:
        cache.save(*([Tier(pick(4))] if pick(2) else []))
    elif wish == 4:
        send(world, key)
    elif wish in (5, 6):
        prefetch = cache.prefetch(cache.match(key), (Tier.STORAGE, Tier.PEER)[wish == 6])
        world.prefetched |= prefetch.moves if prefetch is not None else set()
    elif wish == 7:
        forget(world, Tier(pick(4)))
    elif wish == 8:
        write_to(world, (Tier.HOST, Tier.STORAGE)[pick(2)], pick(3) > 0)
    elif wish == 9:
        assert cache.write_down(key) >= 0
    elif wish in (10, 11):
        tokens_on = cache.expect(key, (NEVER, 0, 1 + pick(50))[pick(3)])
        assert 0 <= tokens_on <= cache.match(key).length
    elif wish in (12, 13):
        line = [world.prompts[pick(len(world.prompts))] for _ in range(pick(5))] if world.prompts else []
        known = cache.foresee([Key(ids[: pick(len(ids) + 1)], whose) for whose, ids in line])
        assert 0 <= known <= sum(cache.match(Key(ids, whose)).branch for whose, ids in line)


def forget(world: World, tier: Tier) -> None:
    """A tier is emptied, unless something that touches it is live; all else stays as it is."""
    inside = world.cache._inside()
    flights = inside.traffic.flights.values()
    used = tier is Tier.DEVICE and bool(world.running or world.offers)
    used = used or any(tier in (flight.src, flight.dst) for flight in flights)
    others = {name: set(held) for name, held in world.held().items() if name[1] is not tier}
    pins = len(inside.pins)
    try:
        world.cache.forget_tier(tier)
    except CacheBusy:
        assert used, f"{tier.name} is not in use"
        return
    assert not used, f"{tier.name} is in use"
    assert not any(shelf.cached for (_, at), shelf in world.cache.stats().shelves.items() if at is tier)
    assert len(world.cache._inside().pins) == (0 if tier is Tier.DEVICE else pins)
    for name, held in world.held().items():
        assert name[1] is tier or held <= others[name], "more is held than before"


def write_to(world: World, tier: Tier, on: bool) -> None:
    """A tier is opened or closed to writing; what was planned before is taken first."""
    world.dispatch()
    try:
        world.cache.write_to(tier, on)
    except ConfigError:
        assert tier not in world.cache._inside().tree.tiers
        return
    world.written = world.written | {tier} if on else world.written - {tier}


def send(world: World, key: Key) -> None:
    """A peer is offered what it lacks of a key, or has fetched what was offered to it."""
    if len(world.offers) > world.pick(3):
        manifest = world.offers.pop(world.pick(len(world.offers)))
        fetch(world, manifest)
        world.cache.learn((Done, Failed)[world.pick(2)](manifest.id))
        return
    start = world.pick(2) * world.pick(len(key) + 1)
    manifest = world.cache.send(key, start)
    length = world.cache.match(key).length
    if manifest is None:
        assert length // world.page <= start // world.page
        return
    assert manifest.tokens == length
    for part in manifest.parts:
        (kind,) = (kind for kind in world.cache.kinds if kind.name == part.kind)
        assert part.first == max(kind.start(length), start) // world.page or kind.rule == "recurrent"
        assert part.first + len(part.slots) == length // world.page, "whole pages up to the end"
    fetch(world, manifest)
    world.offers.append(manifest)


def fetch(world: World, manifest: Manifest) -> None:
    """What is offered lies where the manifest says, for as long as it is offered."""
    for part in manifest.parts:
        for slot, digest in zip(part.slots.tolist(), part.digests, strict=True):
            world.name(part.kind, digest, world.content[part.kind, Tier.DEVICE][slot])
