"""Host memory as a tier: the tokens of transformers, whatever was evicted, did not fit, was late or broke."""

import pytest
from conversations import FAMILIES, HALF, LONG, ask, begin, go_on, tiered
from idle import check_idle

from rootcellar.cache import Tier
from rootcellar.config import EngineConfig
from rootcellar.engine import build
from rootcellar.engine.copies import settle
from rootcellar.errors import ConfigError, GenerationFailed
from rootcellar.tiers.faulty import Faults, Faulty
from rootcellar.tiers.mover import Mover

RECURRENT = FAMILIES[-2:]


def by_day(*names):
    """Every family, those of ``names`` by day."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.long) for name in FAMILIES]


def evict_all(engine):
    """Once what was written down has arrived, take everything from the device."""

    def evict():
        machine = engine._loop.machine
        settle(machine.scheduler, machine.life.mover)
        cache = machine.scheduler.cache
        for kind in cache.kinds:
            size = cache.stats().shelves[kind.name, Tier.DEVICE].size
            assert cache.make_room(kind.name, size)
        assert not any(s.used for (_, tier), s in cache.stats().shelves.items() if tier is Tier.DEVICE)
        settle(machine.scheduler, machine.life.mover)  # what was written back on its way out

    engine._loop.call(evict)


def converse(engine, case, prompts):
    """Each prompt and then its continuation, with nothing on the device in between; its cached tokens."""
    begin(engine, case, prompts)
    evict_all(engine)
    return [sum(details.values()) for details in go_on(engine, case, prompts)]


@pytest.mark.parametrize("name", by_day(*FAMILIES[:-1]))
def test_what_the_device_evicted_is_loaded_and_gives_the_same_tokens(case_of, name):
    case, folder = case_of(name)
    with tiered(folder, hicache_ratio=4.0) as running:
        given = converse(running, case, LONG)
        ends = [len(case.prompts[i]) + HALF - 1 for i in LONG]
        if name in RECURRENT:  # states are left where prompts end, and answers that end on a page
            ends = [end if end % 16 == 0 else len(case.prompts[i]) for i, end in zip(LONG, ends, strict=True)]
        assert given == [end // 16 * 16 for end in ends]
        stats = running.stats()
        assert stats["copies"]["host-device"]["bytes"] > 0
        assert stats["hit_tokens_by_tier"]["HOST"] >= max(given)
        assert stats["host_cache_bytes"] == sum(
            pool.pages * 4 * running._parts.runner.copiers[name].image.nbytes
            for name, pool in running._parts.runner.pools.items()
        )
        check_idle(running)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("qwen2-4kv", "write_through"),
        ("gemma3", "write_back"),
        ("bamba", "write_back"),
        *(pytest.param(name, "write_through", marks=pytest.mark.long) for name in FAMILIES[1:]),
        *(
            pytest.param(name, "write_back", marks=pytest.mark.long)
            for name in FAMILIES
            if name not in ("gemma3", "bamba")
        ),
    ],
)
def test_a_host_smaller_than_the_device_keeps_what_fits(case_of, name, policy):
    case, folder = case_of(name)
    with tiered(folder, hicache_ratio=0.4, hicache_write_policy=policy) as running:
        for some in (LONG[:2], LONG[2:], LONG):
            converse(running, case, some)
        check_idle(running)


@pytest.mark.parametrize("name", by_day("qwen2-4kv", "llama4", "deepseek3"))
def test_whatever_breaks_between_the_tiers_no_token_is_wrong_and_nothing_is_left_behind(case_of, name, monkeypatch):
    case, folder = case_of(name)
    faults = Faults(delay=0.2, fail=0.15, short=0.1, flip=0.2)
    faulty = []

    def broken(device, host, pool_of):
        faulty.extend(Faulty(copier, faults, seed) for seed, copier in enumerate(device.values()))
        return Mover(dict(zip(device, faulty, strict=True)), host, pool_of)

    monkeypatch.setattr(build, "Mover", broken)
    with tiered(folder) as running:
        for _ in range(4):
            converse(running, case, LONG)
        check_idle(running)
        assert sum(place.seen["fail"] + place.seen["short"] for place in faulty)
        stats = running.stats()["copies"]
        assert sum(lane["failed_pages"] for lane in stats.values())
        assert not any(lane["queued_bytes"] for lane in stats.values())


def test_selective_writes_down_what_two_requests_resumed_from(case_of):
    case, folder = case_of("qwen2-4kv")
    with tiered(folder, hicache_write_policy="write_through_selective") as running:
        for expected in (0, 0, 96):
            ask(running, case.prompts[15], 4)
            settled = running._loop.call(lambda: settle(running._loop.machine.scheduler, running._parts.mover))
            assert settled.answers == ()
            assert running.stats()["cache"]["full"]["HOST"]["cached"] >= expected
            if not expected:
                assert running.stats()["cache"]["full"]["HOST"]["used"] == 0
        check_idle(running)


def test_memory_given_back_with_its_prefixes_kept_leaves_them_on_the_host(case_of):
    case, folder = case_of("gemma3")
    with tiered(folder, hicache_write_policy="write_back") as running:
        ask(running, case.prompts[15], HALF)
        assert running.stats()["copies"]["device-host"]["pages"] == 0
        running.release_memory_occupation("kv_cache", preserve=True)
        assert all(tiers["DEVICE"]["used"] == 0 for tiers in running.stats()["cache"].values())
        assert all(tiers["HOST"]["used"] > 0 for tiers in running.stats()["cache"].values())
        running.resume_memory_occupation()
        second = ask(running, case.prompts[15] + case.tokens[15][:HALF], HALF)
        assert second["output_ids"] == case.tokens[15][HALF:]
        assert second["meta_info"]["cached_tokens_details"]["host"] == 128
        running.release_memory_occupation("kv_cache")
        assert not any(shelf["used"] for tiers in running.stats()["cache"].values() for shelf in tiers.values())
        running.resume_memory_occupation()
        check_idle(running)


def test_a_failed_step_costs_the_device_and_nothing_else(case_of, monkeypatch):
    case, folder = case_of("qwen2-4kv")
    with tiered(folder) as running:
        ask(running, case.prompts[15], HALF)
        runner, step = running._parts.runner, running._parts.runner.step

        def breaks(*_):
            monkeypatch.setattr(runner, "step", step)
            raise RuntimeError("the device is on fire")

        monkeypatch.setattr(runner, "step", breaks)
        with pytest.raises(GenerationFailed, match="on fire"):
            ask(running, case.prompts[14], HALF)
        second = ask(running, case.prompts[15] + case.tokens[15][:HALF], HALF)
        assert second["output_ids"] == case.tokens[15][HALF:]
        assert second["meta_info"]["cached_tokens_details"] == {"device": 0, "host": 128, "storage": 0}
        check_idle(running)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="leave one of the two out"):
        EngineConfig(enable_hierarchical_cache=True, disable_radix_cache=True)
