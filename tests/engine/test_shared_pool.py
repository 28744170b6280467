"""Layers of several kinds in one arena: the same answers as with a pool for each, in the memory that was planned."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import rootcellar
from checkpoints import make_checkpoint
from rootcellar.plan.sizing import ARENA

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
PROMPTS = [np.random.default_rng(i).integers(0, 512, 40 + 23 * i).tolist() for i in range(6)]
PROMPTS += [PROMPTS[5][:90] + PROMPTS[0][:20], PROMPTS[4][:64] + PROMPTS[1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    settings = {"layer_types": LAYERS, "num_hidden_layers": len(LAYERS), "sliding_window": 24}
    settings |= {"use_sliding_window": True, "hidden_size": 64, "intermediate_size": 96, "head_dim": 64}
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("hybrid"), **settings)


@pytest.fixture(scope="module", autouse=True)
def groups_of_two():
    """Layers in groups of two although that leaves a sixth unused: so that one group has fewer layers than a page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rootcellar.plan.arena.UNUSED", 0.2)
        yield


def engine(folder, **options):
    options = {
        "max_total_tokens": 2048,
        "max_running_requests": 2,
        "page_size": 4,
        "chunked_prefill_size": 32,
    } | options
    return rootcellar.Engine(model_path=folder, skip_tokenizer_init=True, **options)


@pytest.fixture(scope="module")
def expected(folder):
    """What the same model answers with a pool for each kind and nothing shared."""
    with engine(folder, disable_kv_arena=True, disable_radix_cache=True) as e:
        return [a["output_ids"] for a in e.generate(input_ids=PROMPTS, sampling_params=GREEDY)]


def answers(e):
    return [a["output_ids"] for a in e.generate(input_ids=PROMPTS, sampling_params=GREEDY)]


def shelves(e):
    return {kind: tiers["DEVICE"] for kind, tiers in e.stats()["cache"].items()}


def check_idle(e):
    e.check()
    found = shelves(e)
    size = found["full"]["size"]
    assert found["full"]["free"] + sum(shelf["cached"] for shelf in found.values()) == size
    assert all(shelf["pinned"] == shelf["leased"] == 0 for shelf in found.values())


def test_answers_do_not_depend_on_the_arena(folder, expected):
    with engine(folder) as e:
        assert list(shelves(e)) == ["full", "window.0", "window.1"], "the second window group has one layer of two"
        assert answers(e) == expected
        assert answers(e) == expected  # from the cache
        assert e.stats()["hit_tokens"] > 0
        check_idle(e)


def test_pools_of_their_own_answer_the_same(folder, expected):
    with engine(folder, disable_kv_arena=True) as e:
        assert list(shelves(e)) == ["full", "window"]
        assert answers(e) == expected
        assert answers(e) == expected


def test_one_buffer_for_each_layer_of_a_page_and_the_bytes_that_were_planned(folder):
    with engine(folder) as e:
        report = e.memory_report()
        pool = e._parts.runner.pools[ARENA]
        assert len(pool.buffers) == 2
        assert report["kv_cache_bytes"] == pool.nbytes == sum(b.nbytes for b in jax.tree.leaves(pool.buffers))
        assert report["pools"][ARENA]["tokens"] == shelves(e)["full"]["size"]
        page = 2 * 2 * 64 * 4 * 4 * 2  # K and V, heads, head_dim, float32, tokens, layers
        assert pool.nbytes == (3 * 2048 // 4 + 1) * page, "three groups, each with room for max_total_tokens"


def test_scarce_memory_evicts_and_retracts_and_answers_the_same(folder, expected):
    with engine(folder, max_total_tokens=220) as e:
        assert answers(e) == expected
        found = shelves(e)
        assert sum(shelf["evicted"] for shelf in found.values()) > 0
        check_idle(e)


@pytest.mark.parametrize("preserve", [False, True])
def test_dropped_and_rebuilt(folder, expected, preserve):
    with engine(folder) as e:
        assert answers(e) == answers(e) == expected  # compiles what cold and cached prompts need
        before = e.stats()["compilations"]
        e.release_memory_occupation("kv_cache", preserve=preserve)
        e.resume_memory_occupation("kv_cache")
        assert answers(e) == expected
        hits = [a["meta_info"]["cached_tokens"] for a in e.generate(input_ids=PROMPTS, sampling_params=GREEDY)]
        assert min(hits) > 0
        assert preserve or e.stats()["compilations"] == before, "saving compiles a copy of pages, nothing else does"
        check_idle(e)


def test_a_long_request_takes_the_room_that_windows_leave(folder):
    """With the same bytes a request may be longer than with a pool for each kind."""
    sizes = {}
    for apart in (False, True):
        options = {
            "max_total_tokens": None,
            "device_memory": "13MB",
            "mem_fraction_static": 1.0,
            "context_length": 2048,
        }
        with engine(folder, disable_kv_arena=apart, max_running_requests=1, **options) as e:
            sizes[apart] = e.memory_report()["max_total_num_tokens"], e.memory_report()["kv_cache_bytes"]
            prompt = np.random.default_rng(9).integers(0, 512, e.longest_prompt - 8).tolist()
            e.generate(input_ids=prompt, sampling_params=GREEDY | {"max_new_tokens": 8})
            e.check()
    assert sizes[False][0] > 1.8 * sizes[True][0], sizes


def test_the_map_and_the_occupancy_are_those_of_the_pool(folder):
    with engine(folder) as e:
        answers(e)
        (shared,) = e.sight.memory_map()
        found = shelves(e)
        assert shared["pool"] == ARENA
        assert shared["cells"].count("0") * 4 == found["full"]["free"]
        assert set(shared["cells"]) == {"0", "1"}
        used = sum(shelf["used"] for shelf in found.values()) / found["full"]["size"]
        assert e.stats()["occupancy"] == {"DEVICE": {"used": pytest.approx(used), "busy": 0.0}}
        stream = e.generate(input_ids=PROMPTS[0], sampling_params=GREEDY | {"max_new_tokens": 400}, stream=True)
        seen = set()
        while not seen >= {"2", "3"}:  # in between its last page is full, and it has none of its own
            next(stream)
            (shared,) = e.sight.memory_map()
            seen |= set(shared["cells"])
        assert 0 < e.stats()["occupancy"]["DEVICE"]["busy"] < 1
        stream.close()
