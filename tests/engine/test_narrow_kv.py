"""A KV cache of few bits: the same answers cold, cached, from every tier, after a restart and on two devices."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conversations import tiered
from idle import check_idle

import rootcellar
from checkpoints import make_checkpoint, make_config
from rootcellar.cache import Tier
from rootcellar.engine import memory
from rootcellar.errors import ConfigError
from rootcellar.plan.capacity import Ask, capacity
from rootcellar.plan.grids import NARROW
from rootcellar.plan.layers import read_architecture

PROMPTS = [list(range(5, 75)), list(range(5, 45)) + list(range(200, 240))]

CASES = [("qwen2", dtype) for dtype in NARROW] + [("gemma3", "k8v4"), ("deepseek3", "int8"), ("bamba", "fp8_e4m3")]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    return lambda model: folder / model if (folder / model).exists() else make_checkpoint(model, folder / model)


def ask(engine, **options):
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    return engine.generate(input_ids=PROMPTS, sampling_params=sampling, return_logprob=True, **options)


def answers(engine, where):
    """Tokens and their logprobs; what was cached of the first prompt lay ``where``, and on no other tier."""
    given = ask(engine)
    found = given[0]["meta_info"]["cached_tokens_details"]
    assert {tier for tier, tokens in found.items() if tokens} == ({where} if where else set())
    assert where is None or found[where] >= 32
    return [each["output_ids"] for each in given], logprobs(given, "output_token_logprobs")


def logprobs(given, name):
    return np.array([row[0] for each in given for row in each["meta_info"][name] if row[0] is not None])


def evict(engine):
    """Take everything from the device, once it was written down."""
    engine._loop.machine.life.settle()
    cache = engine._loop.machine.scheduler.cache
    for kind in cache.kinds:
        cache.make_room(kind.name, cache.stats().shelves[kind.name, Tier.DEVICE].size)
    engine._loop.machine.life.settle()


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_answers_are_the_same_wherever_the_pages_came_from(folder_of, tmp_path, model, dtype):
    settings = {"path": str(tmp_path / "pages"), "min_free_space": 0, "max_size": "64MiB", "prefetch_threshold": 16}
    options = {"kv_cache_dtype": dtype, "hicache_ratio": 4.0, "hicache_storage_prefetch_policy": "wait_complete"}

    def engine():
        running = tiered(folder_of(model), **options)
        running.attach_storage("file", settings)
        return running

    def same(running, where):
        tokens, scores = answers(running, where)
        assert tokens == cold[0]
        np.testing.assert_allclose(scores, cold[1], atol=0.02)

    with engine() as running:
        cold = answers(running, None)
        same(running, "device")
        of_prompts = [logprobs(ask(running, logprob_start_len=0), "input_token_logprobs") for _ in range(2)]
        np.testing.assert_array_equal(*of_prompts)
        assert not np.isnan(of_prompts[0]).any()
        running._loop.call(lambda: evict(running))
        same(running, "host")
        running._loop.call(running._loop.machine.life.settle)
        running.flush_cache()
        same(running, "storage")
        compiled = running.stats()["compilations"]
        running.release_memory_occupation("kv_cache")
        running.resume_memory_occupation()
        same(running, "storage")
        assert running.stats()["compilations"] == compiled
        assert running.stats()["copies"]["storage-host"]["failed_pages"] == 0
        check_idle(running)
    with engine() as running:
        same(running, "storage")
        check_idle(running)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_plan_is_what_the_engine_allocates(tmp_path, dtype):
    """To the byte, and so the capacity that the same memory has: against bfloat16, heads of 64."""
    raw = make_config("qwen2", torch_dtype="bfloat16", num_hidden_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_running_requests": 4, "device_memory": "24MB"}
    with rootcellar.Engine(model_path=tmp_path, kv_cache_dtype=dtype, chunked_prefill_size=64, **options) as engine:
        report = memory.report(engine._parts.sizing)
        held = sum(b.nbytes for pool in engine._parts.runner.pools.values() for b in jax.tree.leaves(pool.buffers))
    ask = Ask(read_architecture(raw), kv_cache_dtype=dtype, kv_bytes_per_device=report["available_kv_cache_bytes"])
    plan, wide = capacity(ask), capacity(dataclasses.replace(ask, kv_cache_dtype="bfloat16"))
    assert plan.kv_cache_bytes_all_devices == held == report["kv_cache_bytes"]
    assert plan.max_total_num_tokens == report["max_total_num_tokens"]
    assert plan.bytes_per_token_full == report["cell_size_bytes"]
    least = {"k8v4": 2.4, "fp4_e2m1": 3.4}.get(dtype, 1.9)
    assert plan.max_total_num_tokens / wide.max_total_num_tokens >= least


def test_a_type_that_does_not_fit_the_model_is_refused_by_name(folder_of):
    options = {"skip_tokenizer_init": True, "max_total_tokens": 64}
    with pytest.raises(ConfigError, match="'k8v4' has no layout of latents: choose from"):
        rootcellar.Engine(model_path=folder_of("deepseek3"), kv_cache_dtype="k8v4", **options)
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int3'.*choose|kv_cache_dtype"):
        rootcellar.Engine(model_path=folder_of("qwen2"), kv_cache_dtype="int3", **options)
