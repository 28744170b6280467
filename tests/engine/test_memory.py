"""How large the KV cache becomes: figures, log, refusals, and the planner's prediction against what is allocated."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from idle import check_idle

import rootcellar
from alive import alive
from checkpoints import golden
from rootcellar.config import EngineConfig
from rootcellar.engine import memory
from rootcellar.engine.numbers import numbers
from rootcellar.errors import ConfigError
from rootcellar.models.config import load_config, read_config
from rootcellar.models.kinds import paging
from rootcellar.models.loader import load_params
from rootcellar.models.params import count_bytes
from rootcellar.ops import products
from rootcellar.ops.panels import HOLDINGS
from rootcellar.plan.capacity import Ask, capacity
from rootcellar.plan.layers import read_architecture
from rootcellar.plan.presets import PRESETS
from rootcellar.plan.sizing import divide
from rootcellar.pools import Pool, layout_of
from rootcellar.pools.layouts import page_bytes
from rootcellar.runner import Placement, Programs, Shapes
from rootcellar.runner.reserve import reserve_bytes, weight_bytes

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def programs(config, raw=MODEL, dtype="float32", holding=None):
    """What an engine with these settings would run."""
    model = read_config(raw)
    if config.dtype == "auto":
        kv_dtype = {"auto": dtype, "bf16": "bfloat16"}.get(config.kv_cache_dtype, config.kv_cache_dtype)
    else:
        types = numbers(config, model, loads=True)
        dtype, holding, kv_dtype = types.computed, types.holding, types.kv
    placement = Placement(model, config.tp_size, holding)
    return Programs(
        placement,
        jnp.dtype(dtype),
        paging(placement.served, kv_dtype, config.page_size, arena=False),
        "xla",
        Shapes.of(config.chunked_prefill_size, memory.running_requests(config, config.max_total_tokens)),
        -(-model.context_length // config.page_size),
        config.max_logprobs,
    )


def size(raw=MODEL, dtype="float32", **options):
    config = EngineConfig(**options)
    return memory.size(config, programs(config, raw, dtype), read_config(raw).context_length)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_log_says_it_in_three_lines(tiny_folder, caplog):
    with (
        caplog.at_level(logging.INFO, logger="rootcellar"),
        rootcellar.Engine(
            model_path=tiny_folder, max_total_tokens=1024, device_memory="1GB", log_level="info"
        ) as engine,
    ):
        nbytes = engine.stats()["kv_cache_bytes"]
    lines = [record.getMessage() for record in caplog.records]
    (profile,) = (line for line in lines if line.startswith("Memory profiling"))
    found = re.fullmatch(
        r"Memory profiling: available_kv_cache=([\d.]+) GB, max_tokens=(\d+), cell_size=(\d+) bytes", profile
    )
    assert int(found[2]) == pytest.approx(float(found[1]) * 1e9 / int(found[3]), rel=0.01)
    assert int(found[3]) == 2 * 2 * 2 * 64 * 4  # K and V, layers, heads, head_dim, float32
    assert "max_total_num_tokens: 1024" in lines
    assert f"Fused KV cache allocated. #tokens: 1024, size: {nbytes / 1e9:.3g} GB" in lines


def test_the_report_derives_every_figure(tiny_folder):
    with rootcellar.Engine(
        model_path=tiny_folder, device_memory="300MB", max_total_tokens=2000, page_size=64
    ) as engine:
        report = memory.report(engine._parts.sizing)
        held = engine.stats()["kv_cache_bytes"]
    assert set(report["derivation"]) == set(report) - {"derivation"}
    assert all(report["derivation"].values())
    model = load_config(tiny_folder)
    assert report["weight_bytes"] == count_bytes(model, jnp.float32)
    assert report["available_kv_cache_bytes"] == (
        int(300e6 * 0.9) - report["weight_bytes"] - report["activation_reserve_bytes"]
    )
    assert report["max_total_num_tokens"] == 2000 // 64 * 64
    assert report["kv_cache_bytes"] == held == (2000 // 64 + 1) * 64 * report["cell_size_bytes"]
    assert report["max_running_requests"] == 1984 // 128
    assert json.loads(json.dumps(report)) == report


def test_on_a_cpu_what_nobody_asked_for_stays_small():
    sizing = size(device_memory="4GB")
    assert sizing.division.tokens == memory.MOST_REQUESTS * 256
    assert "64 requests of context_length=256" in memory.report(sizing)["derivation"]["max_total_num_tokens"]
    assert sizing.fitting_tokens > 4e9 * 0.8 / sizing.cell_size
    # Whoever says how many requests run has thought about memory: all of it is theirs.
    with measuring_a_third():
        assert size(device_memory="4GB", max_running_requests=64).division.tokens >= sizing.fitting_tokens


def test_the_default_is_half_of_the_machine():
    usable = memory.usable_memory(EngineConfig(), jax.devices()[0], 0)
    assert usable.nbytes == memory.machine_memory() // 2
    shared = memory.usable_memory(EngineConfig(tp_size=4, device_memory="4GB"), jax.devices()[0], 0)
    assert shared.nbytes == 10**9


def test_an_accelerator_says_what_it_has():
    stats = {"bytes_limit": 80 * 10**9, "bytes_in_use": 7 * 10**9}
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert memory.usable_memory(EngineConfig(), device, 0) == memory.Usable(
        80 * 10**9, 7 * 10**9, f"what {device} lets JAX use"
    )
    # Weights that were handed over are counted as weights, not as somebody else's.
    assert memory.usable_memory(EngineConfig(), device, 6 * 10**9).others == 10**9
    assert memory.usable_memory(EngineConfig(device_memory="16GB"), device, 0).nbytes == 16 * 10**9
    silent = SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    assert memory.usable_memory(EngineConfig(device_memory="16GB"), silent, 0).nbytes == 16 * 10**9
    with pytest.raises(ConfigError, match="set device_memory"):
        memory.usable_memory(EngineConfig(), silent, 0)


def test_bf16_is_bfloat16():
    assert size(kv_cache_dtype="bf16", device_memory="1GB").cell_size == size(device_memory="1GB").cell_size // 2


# --- what the programs need -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # bfloat16 on CPU: with float32 copies of the weights
def test_the_bound_is_above_what_the_compiler_says(dtype):
    config = EngineConfig(chunked_prefill_size=64, max_running_requests=8)
    asked = programs(config, {**MODEL, "num_hidden_layers": 1}, dtype)
    live = len(alive())
    parts = reserve_bytes(asked)
    assert len(alive()) == live, "measuring allocates nothing"
    assert all(nbytes > 0 for nbytes in parts.values())
    logits = 8 * 128 * 4
    assert parts["decode"] >= logits + 8 * 32 * asked.dtype.itemsize
    measured = max(parts["prefill"], parts["decode"]) + max(parts["sample"], parts["score"])
    assert measured <= memory.estimate_reserve(asked)


@pytest.mark.skipif(not products.runs("cpu"), reason="no kernels here")
@pytest.mark.parametrize("holding", ["bfloat16", "w8", "w4"])
@pytest.mark.parametrize("vectors", ["", "baseline"])
def test_packed_weights_are_written_out_one_after_the_other(vectors, holding, monkeypatch):
    """By XLA, in a step of many tokens. Those of all layers at once would be what packing saved, several times."""
    monkeypatch.setenv("ROOTCELLAR_VECTORS", vectors)
    wide = {**MODEL, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 4}
    config = EngineConfig(chunked_prefill_size=products.MANY, max_running_requests=4)
    asked = programs(config, wide, holding=holding)
    parts = reserve_bytes(asked)
    written = parts["prefill"] - reserve_bytes(programs(config, wide))["prefill"]
    largest = 256 * 2 * 2048 * 4
    # Of integers, or by wide vectors, kernels take any number of rows, and nothing is written.
    most = 0 if HOLDINGS[holding].grouped or products.many() == math.inf else 2 * largest
    assert 0 < written < most if most else written < largest / 4
    measured = max(parts["prefill"], parts["decode"]) + max(parts["sample"], parts["score"])
    assert measured <= memory.estimate_reserve(asked)
    few = dataclasses.replace(asked, shapes=Shapes.of(products.MANY // 2, 4))
    assert memory.estimate_reserve(few) < memory.estimate_reserve(asked) - most


OVER_A_MESH = """
import json, sys
import test_memory as t
config = t.EngineConfig(chunked_prefill_size=16, max_running_requests=2, tp_size=4, max_total_tokens=256)
asked = t.programs(config, json.loads(sys.argv[1]))
weights = t.weight_bytes(asked.placement, "float32")
print(json.dumps([t.reserve_bytes(asked), t.memory.estimate_reserve(asked), weights]))
"""


def test_over_a_mesh_no_device_gathers_the_vocabulary():
    """Each computes the scores of its own part, and the scores are gathered: a little, where the weights are much."""
    raw = {**MODEL, "vocab_size": 40_000, "num_hidden_layers": 1}
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", OVER_A_MESH, json.dumps(raw)],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    parts, bound, weights = json.loads(done.stdout)
    embedding = 40_000 * 32 * 4
    assert weights == pytest.approx(embedding / 4, rel=0.05)
    assert parts["decode"] < embedding / 2
    assert max(parts["prefill"], parts["decode"]) + max(parts["sample"], parts["score"]) <= bound


def test_what_was_measured_does_not_depend_on_the_budget():
    """Where the bound leaves it open the compiler is asked, and then everything that fits is taken."""
    config = {"chunked_prefill_size": 64, "max_running_requests": 4, "page_size": 16}
    sizing = size(device_memory="3MB", **config)
    assert "measured" in sizing.reserve_how
    page = sizing.cell_size * 16
    assert sizing.division.nbytes <= sizing.available < sizing.division.nbytes + page


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_refused_before_anything_is_allocated(tiny_folder, monkeypatch):
    def never(*_args):
        raise AssertionError("allocated")

    monkeypatch.setattr("rootcellar.engine.build.load_params", never)
    monkeypatch.setattr(Pool, "allocate", never)
    live = len(alive())
    with pytest.raises(ConfigError) as caught:
        rootcellar.Engine(model_path=tiny_folder, device_memory="20MB", max_total_tokens=100_000)
    assert len(alive()) == live
    text = str(caught.value)
    assert text.startswith("Not enough memory. Please try to increase --mem-fraction-static. ")
    assert "0.02 GB are usable (device_memory=20MB), times mem_fraction_static=0.9" in text
    assert "max_total_tokens=100000 takes" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hicache_ratio": 1e6}, "hicache_ratio=1e\\+06 takes .* GB are left for it: at most hicache_ratio="),
        ({"hicache_size": 1e6}, "hicache_size=1e\\+06 takes .* or hicache_size=.* would fit"),
        ({"hicache_ratio": 1e-9}, "hicache_ratio=1e-09 leaves no page"),
    ],
)
def test_a_host_tier_that_does_not_fit_is_refused_before_anything_is_allocated(
    tiny_folder, monkeypatch, options, words
):
    def never(*_args):
        raise AssertionError("allocated")

    monkeypatch.setattr("rootcellar.engine.build.load_params", never)
    monkeypatch.setattr(Pool, "allocate", never)
    live = len(alive())
    with pytest.raises(ConfigError, match=words):
        rootcellar.Engine(model_path=tiny_folder, max_total_tokens=1024, enable_hierarchical_cache=True, **options)
    assert len(alive()) == live


@pytest.mark.parametrize("handed_over", [False, True])
def test_on_a_cpu_the_host_tier_gets_what_weights_and_pools_will_leave(monkeypatch, handed_over):
    """They are taken from the memory that is free now; weights that were handed over were taken before."""
    config = EngineConfig(max_total_tokens=1024, device_memory="1GB", hicache_ratio=2.0)
    made = programs(config)
    sizing = memory.size(config, made, 256)
    images = 1024 // config.page_size * made.image_bytes["full"]
    needed = 2 * images + sizing.division.nbytes + (0 if handed_over else sizing.weights)
    monkeypatch.setattr(memory, "free_memory", lambda: needed)
    assert memory.size_host(sizing, made, loads=not handed_over) == {"full": 2 * 1024 // config.page_size}
    monkeypatch.setattr(memory, "free_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match=r"at most hicache_ratio=1\.99 "):
        memory.size_host(sizing, made, loads=not handed_over)


def test_pages_of_host_memory_are_as_large_as_those_that_are_copied(tiny_folder):
    with rootcellar.Engine(model_path=tiny_folder, max_total_tokens=1024, enable_hierarchical_cache=True) as engine:
        runner = engine._parts.runner
        assert runner.programs.image_bytes == {name: c.image.nbytes for name, c in runner.copiers.items()}
        assert engine.stats()["host_cache_bytes"] == 2 * sum(
            pool.pages * runner.programs.image_bytes[name] for name, pool in runner.pools.items()
        )


def test_more_than_the_machine_has_is_no_remedy(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 10**9)
    options = {"max_total_tokens": 10**7, "dtype": "bfloat16", "kv_cache_dtype": "bf16"}
    with measuring_a_third(), pytest.raises(ConfigError) as caught:
        size(**options)
    assert "0.50 GB are usable (half of the machine's memory)" in str(caught.value)
    assert "device_memory=" not in str(caught.value)
    assert "max_total_tokens=" in str(caught.value).partition("would fit")[2]


@pytest.mark.skipif(not products.runs("cpu"), reason="no kernels here")
def test_bfloat16_is_a_remedy_where_weights_are_read_and_none_where_they_were_handed_over(tiny_folder):
    shapes = {"max_total_tokens": 256, "max_running_requests": 2, "chunked_prefill_size": 16}
    options = {"model_path": tiny_folder, "device_memory": "5MB", "mem_fraction_static": 1.0, **shapes}
    weights = load_params(Path(tiny_folder), load_config(tiny_folder), jnp.float32)
    with pytest.raises(ConfigError, match=r"would fit:.* dtype='bfloat16'"):
        rootcellar.Engine(**options)
    with pytest.raises(ConfigError, match=r"would fit: (?!.*; dtype=)"):
        rootcellar.Engine(**options, params=weights)
    with rootcellar.Engine(**options, dtype="bfloat16") as engine:
        assert engine.stats()["kv_cache_bytes"] > 0
        check_idle(engine)


# --- never beyond the budget, never a refusal of what fits ------------------------------------------------------------


@st.composite
def models(draw):
    kv, group = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    return {
        **MODEL,
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "head_dim": draw(st.sampled_from([2, 8, 64])),
        "hidden_size": draw(st.sampled_from([16, 64])),
        "vocab_size": draw(st.sampled_from([16, 1000])),
        "num_hidden_layers": draw(st.integers(1, 3)),
    }


@st.composite
def requests(draw):
    return {
        "page_size": draw(st.sampled_from([1, 4, 16, 64])),
        "mem_fraction_static": draw(st.sampled_from([0.3, 0.9, 1.0])),
        "max_total_tokens": draw(st.none() | st.integers(64, 5000)),
        "max_running_requests": draw(st.none() | st.sampled_from([1, 7, 64])),
        "chunked_prefill_size": draw(st.sampled_from([16, 512])),
        "kv_cache_dtype": draw(st.sampled_from(["auto", "bf16", "float32"])),
        "device_memory": f"{draw(st.integers(10_000, 5_000_000))}",
    }


@contextlib.contextmanager
def measuring_a_third():
    """Instead of compiling: programs that need a third of the bound, spread over the parts."""

    def pretend(asked):
        nbytes = memory.estimate_reserve(asked) // 3
        return {"prefill": nbytes // 2, "decode": nbytes // 4, "sample": nbytes - nbytes // 2, "score": 0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "reserve_bytes", pretend)
        yield


def pool_bytes(raw, options, tokens):
    """What pools of ``tokens`` tokens take, buffer by buffer, by the shape that they are allocated with."""
    model, page = read_config(raw), options["page_size"]
    dtype = {"bf16": "bfloat16"}.get(options["kv_cache_dtype"], "float32")
    layouts = [layout_of(layer.mixer.stored, dtype, page) for layer in model.layers]
    return sum((tokens // page + 1) * page_bytes(layout) for layout in layouts)


@settings(deadline=None, max_examples=150)
@given(models(), requests())
def test_never_beyond_the_budget_and_never_a_refusal_of_what_fits(raw, options):
    config, page = EngineConfig(**options), options["page_size"]
    asked = programs(config, raw)
    limit = int(int(options["device_memory"]) * options["mem_fraction_static"])
    # What is taken beside the pools: what the programs need was not measured when the bound on it was enough.
    least = count_bytes(read_config(raw), jnp.float32) + memory.estimate_reserve(asked) // 3
    wanted = page if options["max_total_tokens"] is None else options["max_total_tokens"] // page * page
    fits = least + pool_bytes(raw, options, wanted) <= limit
    with measuring_a_third():
        try:
            sizing = memory.size(config, asked, 256)
        except ConfigError as error:
            assert not fits, "refused what fits"
            remedies_hold(raw, options, str(error))
            return
    assert fits
    tokens = sizing.division.tokens
    assert sizing.division.nbytes == pool_bytes(raw, options, tokens)
    assert least + pool_bytes(raw, options, tokens) <= limit
    if options["max_total_tokens"] is not None:
        assert tokens == wanted
        return
    cap = math.inf if options["max_running_requests"] else 64 * 256
    assert tokens <= cap
    slow, held = page, pool_bytes(raw, options, page)
    one_more = pool_bytes(raw, options, 2 * page) - held
    while slow + page <= cap and least + held + one_more <= limit:
        slow, held = slow + page, held + one_more
    assert tokens == slow


def remedies_hold(raw, options, message):
    """Each change that the message offers is enough by itself."""
    offered = message.partition("Any one of these would fit: ")[2].removesuffix(".")
    for remedy in filter(None, offered.split("; ")):
        name, value = re.match(r"(\w+)='?([\w.]+)", remedy).groups()
        kind = {"mem_fraction_static": float, "device_memory": str, "kv_cache_dtype": str, "dtype": str}.get(name, int)
        config = EngineConfig(**{**options, name: kind(value)})
        memory.size(config, programs(config, raw), 256)


# --- the planner's prediction -----------------------------------------------------------------------------------------

SHRUNK = {  # two layers; where a model has two kinds, one of each
    "qwen2.5-3b": {},
    "mistral-7b": {},
    "llama-4-scout": {"no_rope_layers": [1, 0]},
    "gemma-3-27b": {"sliding_window_pattern": 2},
    "gpt-oss-120b": {},
    "deepseek-v3": {},
    "bamba-9b": {"attn_layer_indices": [1]},
}


def shrunk(name):
    raw = PRESETS[name]
    return {**raw, **raw.get("text_config", {}), "text_config": None, "num_hidden_layers": 2, **SHRUNK[name]}


@pytest.mark.parametrize(("name", "page_size"), [("qwen2.5-3b", 1), ("qwen2.5-3b", 64), ("mistral-7b", 16)])
def test_the_plan_is_what_the_engine_allocates(name, page_size, tmp_path):
    """KV heads and head_dim are the model's; what the cache does not depend on is made small.

    Models of this release have full attention only, so Mistral's window is off, for engine and planner alike.
    """
    raw = {**shrunk(name), "sliding_window": None, "head_dim": 128, "vocab_size": 64, "intermediate_size": 64}
    raw |= {"hidden_size": 64, "max_position_embeddings": 512, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "kv_cache_dtype": "bf16", "page_size": page_size}
    with rootcellar.Engine(model_path=tmp_path, device_memory="100MB", max_running_requests=4, **options) as engine:
        report = memory.report(engine._parts.sizing)
        held = sum(b.nbytes for pool in engine._parts.runner.pools.values() for b in jax.tree.leaves(pool.buffers))
    model = read_architecture(raw)
    ask = Ask(model, page_size=page_size, kv_bytes_per_device=report["available_kv_cache_bytes"])
    assert capacity(ask).kv_cache_bytes_all_devices == held == report["kv_cache_bytes"]
    assert capacity(ask).max_total_num_tokens == report["max_total_num_tokens"] == report["max_tokens"]
    assert capacity(ask).bytes_per_token_full == report["cell_size_bytes"]
    tokens = report["max_total_num_tokens"]
    again = capacity(dataclasses.replace(ask, kv_bytes_per_device=None, max_total_tokens=tokens))
    assert again.kv_cache_bytes_all_devices == held


@pytest.mark.parametrize(("guessed", "spare"), [(0, 0), (2, 3), (5, 7)])
def test_the_plan_is_what_the_engine_allocates_of_states_those_of_guesses_among_them(guessed, spare, tmp_path):
    """A step of four rows verifies three tokens of others, and of one row's more than that where more are guessed."""
    golden("bamba").make(tmp_path)
    options = {"skip_tokenizer_init": True, "kv_cache_dtype": "bf16", "device_memory": "100MB"}
    options |= {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": guessed} if guessed else {}
    with rootcellar.Engine(model_path=tmp_path, max_running_requests=4, **options) as engine:
        report, pools = memory.report(engine._parts.sizing), engine._parts.runner.pools
        held = sum(b.nbytes for pool in pools.values() for b in jax.tree.leaves(pool.buffers))
        states = engine.stats()["cache"]["recurrent"]["DEVICE"]["size"]
        assert {len(b) for b in jax.tree.leaves(pools["recurrent"].buffers)} == {states + 1 + spare}
    assert (report["spare_states"], report["pools"]["recurrent"]["tokens"]) == (spare, states)
    ask = Ask(
        read_architecture(json.loads((tmp_path / "config.json").read_text())),
        kv_cache_dtype="bf16",
        kv_bytes_per_device=report["available_kv_cache_bytes"],
        max_running_requests=4,
        speculative_num_draft_tokens=guessed,
    )
    figures = capacity(ask)
    assert figures.kv_cache_bytes_per_device == held == report["kv_cache_bytes"]
    assert figures.pool_tokens["recurrent"] == states
    assert ("for guesses" in figures.formulas["kv_cache_bytes_per_device"]) == bool(guessed)


@pytest.mark.parametrize("name", ["mistral-7b", "llama-4-scout", "gemma-3-27b", "gpt-oss-120b"])
def test_the_plan_is_what_pools_of_every_kind_allocate(name):
    """The engine has no model with windows yet: the pools that it would allocate, one for each kind."""
    model = read_architecture(shrunk(name))
    ask = Ask(model, kv_bytes_per_device=6 * 10**7, swa_full_tokens_ratio=0.5)
    division = divide(ask.costs(), ask.rules, 6 * 10**7)
    held = 0
    for group in model.groups:
        layout = layout_of(group.stored, "bfloat16", 16)
        pool = Pool(layout, len(group.kind.layers), division.pages[group.kind.name])
        held += sum(b.nbytes for b in jax.tree.leaves(pool.buffers))
        pool.free()
    assert capacity(ask).kv_cache_bytes_per_device == held <= 6 * 10**7


def test_the_plan_is_what_pools_of_latents_and_states_allocate():
    """The engine has no such model yet either: the pools that it would allocate."""
    ask = Ask(read_architecture(shrunk("deepseek-v3")), max_total_tokens=160)
    (group,) = ask.model.groups
    latents = Pool(layout_of(group.stored, "bfloat16", 16), 2, 10)
    buffers = jax.tree.leaves(latents.buffers)
    assert [b.shape for b in buffers] == [(11, 16, 512 + 64)] * 2
    assert capacity(ask).kv_cache_bytes_per_device == sum(b.nbytes for b in buffers) == latents.nbytes
    ask = Ask(read_architecture(shrunk("bamba-9b")), kv_bytes_per_device=10**8)
    tokens = capacity(ask).pool_tokens
    layouts = [layout_of(group.stored, "bfloat16", 16) for group in ask.model.groups]
    pools = [
        Pool(layout, 1, tokens[group.kind.name] // layout.page_size)
        for layout, group in zip(layouts, ask.model.groups, strict=True)
    ]
    assert [b.dtype for b in jax.tree.leaves(pools[1].buffers)] == [jnp.bfloat16, jnp.float32]
    assert pools[1].buffers[0][0].shape[1:] == (3, 8192 + 256)
    held = sum(b.nbytes for pool in pools for b in jax.tree.leaves(pool.buffers))
    assert capacity(ask).kv_cache_bytes_per_device == held == sum(pool.nbytes for pool in pools) <= 10**8


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [(16, 2), (32, 8), (16, 16), (6, 3), (4, 1)])
def test_the_plan_divides_heads_as_the_engine_places_them(tp, heads, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: tp)
    raw = {**MODEL, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    placement = Placement(read_config(raw), tp)
    on_each = placement.served.layers[0].mixer.num_kv_heads // (tp if placement.splits_heads else 1)
    figures = capacity(Ask(read_architecture(raw), tp=tp, devices=tp))
    assert figures.bytes_per_token_per_device == 2 * 2 * on_each * 8 * 2


def test_weights_are_counted_as_they_are_placed():
    model = read_config(MODEL)
    assert weight_bytes(Placement(model, 1), jnp.bfloat16) == count_bytes(model, jnp.bfloat16)
