"""Memory dropped and rebuilt, weights changed: same tokens, no recompilation, nothing stale, exact bytes."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idle import check_idle

import rootcellar
from alive import alive
from rootcellar.errors import ConfigError, EngineError, ModelError
from rootcellar.models.config import load_config
from rootcellar.models.loader import load_params
from slowly import slowly

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
PROMPT = list(range(5, 75))


@pytest.fixture(scope="module")
def weights(tiny_folder):
    return load_params(tiny_folder, load_config(tiny_folder), jnp.float32)


@pytest.fixture
def engine(tiny_engine):
    """The engine of all tests, with nothing cached; whatever a test does to its memory, it is there again after it."""
    tiny_engine.flush_cache()
    yield tiny_engine
    tiny_engine.continue_generation()
    tiny_engine.resume_memory_occupation()
    check_idle(tiny_engine)


@pytest.fixture
def own(tiny_folder):
    """An engine of the test's own, whose weights may change."""
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=1024, max_running_requests=4, chunked_prefill_size=64
    ) as engine:
        yield engine
        check_idle(engine)


@pytest.fixture
def given(tiny_folder, weights):
    """The same with weights that were handed over."""
    with rootcellar.Engine(
        model_path=tiny_folder,
        params=weights,
        max_total_tokens=1024,
        max_running_requests=4,
        chunked_prefill_size=64,
    ) as engine:
        yield engine
        check_idle(engine)


def ask(engine, prompt=PROMPT, **options):
    return engine.generate(input_ids=prompt, sampling_params={**GREEDY, **options})


def deleted(report):
    return report["buffers"], report["bytes"]


def live_bytes(engine):
    """Of all arrays, between two steps: until one is over it has some of its own."""
    engine.check()
    return sum(a.nbytes for a in alive())


def start(engine, **options):
    """A long request on a thread of its own, running; gives the list that its result comes to, and the thread."""
    results, begun = [], threading.Event()

    def call():
        for part in engine.generate(input_ids=PROMPT, sampling_params={**GREEDY, **options}, stream=True):
            results[:] = [part]
            begun.set()

    caller = threading.Thread(target=call)
    caller.start()
    assert begun.wait(60)
    return results, caller


@pytest.mark.parametrize("preserve", [False, True])
def test_drop_and_rebuild_the_cache(engine, preserve):
    expected = ask(engine)["output_ids"]
    assert ask(engine)["output_ids"] == expected  # compiles the step for a prompt that is nearly all cached
    size = engine.stats()["kv_cache_bytes"]
    engine.release_memory_occupation("kv_cache", preserve=True)  # compiles the copying once
    engine.resume_memory_occupation("kv_cache")
    before, compiled = live_bytes(engine), engine.stats()["compilations"]
    for _ in range(3):
        assert deleted(engine.release_memory_occupation("kv_cache", preserve=preserve)) == (2, size)
        assert live_bytes(engine) == before - size
        assert deleted(engine.release_memory_occupation("kv_cache")) == (0, 0)
        with pytest.raises(EngineError, match=r"resume_memory_occupation\(\['kv_cache'\]\)"):
            ask(engine)
        assert engine.resume_memory_occupation() == {"buffers": 2, "bytes": size}
        assert live_bytes(engine) == before
        again = ask(engine)
        assert again["output_ids"] == expected
        assert again["meta_info"]["cached_tokens"] == (64 if preserve else 0)
        engine.check()
    assert engine.stats()["compilations"] == compiled


def test_flush_while_released_forgets_what_was_preserved(engine):
    ask(engine)
    engine.release_memory_occupation("kv_cache", preserve=True)
    engine.flush_cache()
    engine.resume_memory_occupation()
    assert ask(engine)["meta_info"]["cached_tokens"] == 0


def test_own_weights_are_deleted_and_read_again(engine):
    expected = ask(engine)["output_ids"]
    assert ask(engine)["output_ids"] == expected
    before = live_bytes(engine)
    weights = sum(a.nbytes for a in jax.tree.leaves(engine._parts.runner.params))
    assert engine.release_memory_occupation(["weights"])["bytes"] == weights
    assert live_bytes(engine) == before - weights
    compiled = engine.stats()["compilations"]
    engine.resume_memory_occupation(["weights"])
    assert live_bytes(engine) == before
    assert ask(engine)["output_ids"] == expected
    assert engine.stats()["compilations"] == compiled


def test_weights_that_were_handed_over_stay_the_callers(tiny_folder, weights):
    with rootcellar.Engine(model_path=tiny_folder, params=weights, max_total_tokens=256) as engine:
        expected = ask(engine)["output_ids"]
        engine.release_memory_occupation()
        assert not weights["norm"].is_deleted()
        with pytest.raises(EngineError, match="update_weights"):
            engine.resume_memory_occupation()
        engine.update_weights(weights)
        engine.resume_memory_occupation()
        assert ask(engine)["output_ids"] == expected


@pytest.mark.parametrize("mode", ["wait", "retract", "abort"])
def test_release_with_work_in_flight(engine, mode):
    expected = ask(engine, max_new_tokens=300)["output_ids"]
    engine.flush_cache()
    with slowly(engine, 0.003):
        results, caller = start(engine, max_new_tokens=300)
        engine.release_memory_occupation("kv_cache", mode=mode)
    stats = engine.stats()
    assert stats["running"] == 0
    assert stats["waiting"] == (1 if mode == "retract" else 0)
    engine.resume_memory_occupation()
    caller.join(timeout=60)
    reason = results[0]["meta_info"]["finish_reason"]["type"]
    assert reason == ("abort" if mode == "abort" else "length")
    if mode != "abort":
        assert results[0]["output_ids"] == expected


def test_pause_flush_continue(engine):
    expected = ask(engine, max_new_tokens=300)["output_ids"]
    with slowly(engine, 0.003):
        results, caller = start(engine, max_new_tokens=300)
        engine.pause_generation("retract")
    engine.flush_cache()
    steps = engine.stats()["steps"]
    time.sleep(0.05)
    assert engine.stats()["steps"] == steps
    engine.continue_generation()
    caller.join(timeout=60)
    assert results[0]["output_ids"] == expected


def test_pause_in_place_keeps_leases_and_says_so(engine):
    with slowly(engine, 0.003):
        results, caller = start(engine, max_new_tokens=300)
        engine.pause_generation("in_place")
    with pytest.raises(EngineError, match="1 requests run"):
        engine.flush_cache()
    with pytest.raises(EngineError, match="paused"):
        engine.release_memory_occupation("kv_cache", mode="wait")
    engine.continue_generation()
    caller.join(timeout=60)
    assert len(results[0]["output_ids"]) == 300


def test_weights_that_lie_in_the_same_place_under_another_name_are_not_copied(given, weights):
    """A trainer's arrays have shardings of its mesh: on one device that is where ours lie."""
    ask(given)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    theirs = jax.device_put(weights, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(theirs)]
    compiled = given.stats()["compilations"]
    assert given.update_weights(theirs)["copied"] == []
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(given._parts.runner.params)] == pointers
    ask(given)
    assert given.stats()["compilations"] == compiled
    host = {**theirs, "norm": np.array(theirs["norm"])}
    assert given.update_weights(host)["copied"] == ["norm"]
    given.update_weights(weights)


def test_updated_weights_are_used_without_a_copy_and_nothing_stale_is_hit(given, weights):
    first = ask(given)
    ask(given)
    changed = jax.tree.map(lambda a: a * 1.25, weights)
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(changed)]
    compiled = given.stats()["compilations"]
    assert given.update_weights(changed) == {"weight_version": "1", "copied": []}
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(given._parts.runner.params)] == pointers
    second = ask(given)
    assert second["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["weight_version"] == "1"
    assert second["output_ids"] != first["output_ids"]
    assert ask(given)["meta_info"]["cached_tokens"] == 64
    given.update_weights(weights, version="step-7")
    third = ask(given)
    assert third["output_ids"] == first["output_ids"]
    assert third["meta_info"]["cached_tokens"] == 0
    assert given.stats()["compilations"] == compiled


def test_weights_changed_during_a_request_are_told_apart(own, weights):
    with slowly(own, 0.003):
        results, caller = start(own, max_new_tokens=400)
        own.update_weights(jax.tree.map(lambda a: a * 1.25, weights), version="b")
    caller.join(timeout=60)
    spans = results[0]["meta_info"]["weight_versions"]
    assert [name for name, _ in spans] == ["0", "b"]
    assert 0 == spans[0][1] < spans[1][1] < 400
    assert ask(own)["meta_info"]["cached_tokens"] == 0  # what it committed is of mixed weights


def test_update_from_disk(own, tiny_folder, tmp_path):
    from checkpoints import make_checkpoint

    other = make_checkpoint("qwen2", tmp_path / "other", tokenizer=True, seed=5)
    first = ask(own)["output_ids"]
    own.update_weights_from_disk(other, version="other")
    changed = ask(own)
    assert changed["output_ids"] != first
    own.release_memory_occupation("weights")
    own.resume_memory_occupation("weights")  # read again from the new folder
    own.flush_cache()
    assert ask(own)["output_ids"] == changed["output_ids"]
    wider = make_checkpoint("qwen2", tmp_path / "wider", tokenizer=True, intermediate_size=512)
    with pytest.raises(ModelError, match="intermediate_size"):
        own.update_weights_from_disk(wider)


def test_weights_that_do_not_fit_are_named_and_nothing_changes(engine, weights):
    expected = ask(engine)["output_ids"]
    with pytest.raises(ModelError, match="missing norm"):
        engine.update_weights({k: v for k, v in weights.items() if k != "norm"})
    with pytest.raises(ModelError, match="norm is bfloat16, not float32"):
        engine.update_weights({**weights, "norm": weights["norm"].astype(jnp.bfloat16)})
    with pytest.raises(ModelError, match="norm has shape"):
        engine.update_weights({**weights, "norm": weights["norm"][:-1]})
    assert ask(engine)["output_ids"] == expected


def test_the_process_gets_the_memory_back(tiny_folder):
    """A pool that was written is resident; dropping it returns its bytes to the system, not only to an allocator."""
    with rootcellar.Engine(model_path=tiny_folder, max_total_tokens=1 << 16) as engine:
        (pool,) = engine._parts.runner.pools.values()
        touch = jax.jit(lambda b: b + 1, donate_argnums=0)
        returned = []
        for attempt in range(3):  # on a busy machine the runtime may hold a donated buffer for a moment longer
            pool.buffers = jax.block_until_ready(jax.tree.map(touch, pool.buffers))
            time.sleep(0.1 * attempt)
            report = engine.release_memory_occupation("kv_cache")
            if report["resident_bytes"] is None:
                pytest.skip("this system does not say what is resident")
            assert report["bytes"] == pool.nbytes > 100e6
            returned.append(report["resident_bytes"])
            engine.resume_memory_occupation()
        assert pytest.approx(pool.nbytes, rel=0.1) in returned


def test_compiled_programs_can_be_forgotten_too(engine):
    expected = ask(engine)["output_ids"]
    compiled = engine.stats()["compilations"]
    engine.release_memory_occupation("kv_cache", clear_compiled=True)
    engine.resume_memory_occupation()
    assert ask(engine)["output_ids"] == expected
    assert engine.stats()["compilations"] > compiled


def test_unknown_tags_and_modes(engine):
    with pytest.raises(ConfigError, match="kv_cache, weights"):
        engine.release_memory_occupation("kv")
    with pytest.raises(ConfigError, match="wait, abort, retract"):
        engine.release_memory_occupation("kv_cache", mode="now")
    with pytest.raises(ConfigError, match="in_place"):
        engine.pause_generation("softly")


@pytest.mark.parametrize("cycles", [10, pytest.param(300, marks=pytest.mark.long)])
def test_many_cycles_under_load(engine, cycles):
    """Drop and rebuild while callers generate: the same tokens, nothing compiled, nothing grows."""
    prompts = [PROMPT[: 20 + 9 * i] for i in range(4)]
    expected = [ask(engine, p, max_new_tokens=30)["output_ids"] for p in prompts]
    engine.warm_up()
    for preserve in (True, False):
        engine.release_memory_occupation("kv_cache", preserve=preserve)
        engine.resume_memory_occupation()
    compiled, before = engine.stats()["compilations"], live_bytes(engine)
    stop = threading.Event()
    wrong, answered, refusals, came = [], [], [], threading.Semaphore(0)

    def load(i):
        while not stop.is_set():
            try:
                result = ask(engine, prompts[i], max_new_tokens=30)
            except EngineError as error:  # refused while released, and told why
                refusals.append(str(error))
                continue
            answered.append(i)
            if result["output_ids"] != expected[i]:
                wrong.append(result)
            came.release()

    callers = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for cycle in range(cycles):
        engine.release_memory_occupation("kv_cache", mode=("wait", "retract")[cycle % 2], preserve=cycle % 3 == 0)
        engine.resume_memory_occupation()
        if wrong or not came.acquire(timeout=60):  # an answer between two cycles
            break
    stop.set()
    for caller in callers:
        caller.join(timeout=60)
    assert not wrong
    assert cycle == cycles - 1
    assert all("resume_memory_occupation" in message for message in refusals)
    assert set(answered) == {0, 1, 2, 3}
    assert engine.stats()["compilations"] == compiled
    assert live_bytes(engine) == before
