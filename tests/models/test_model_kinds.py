"""Kinds follow from layers, and the planner reads the same from the config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import FAMILIES, make_config
from rootcellar.cache.kind import chunked_local, full, sliding_window
from rootcellar.models.config import read_config
from rootcellar.models.kinds import kinds_of
from rootcellar.models.loader import params_from_tensors, tensors_from_params
from rootcellar.models.model import LayerConfig
from rootcellar.models.params import init_params
from rootcellar.plan.layers import read_architecture
from rootcellar.plan.presets import PRESETS
from rootcellar.pools.layouts import page_bytes


def agree(raw):
    cfg = read_config(raw)
    kinds, layouts = kinds_of(cfg, "bfloat16", 16)
    groups = read_architecture(raw).groups
    assert kinds == tuple(group.kind for group in groups)
    for kind, group in zip(kinds, groups, strict=True):
        nbytes = len(kind.layers) * page_bytes(layouts[kind.name])
        assert nbytes == (
            group.state_bytes("bfloat16") if kind.rule == "recurrent" else 16 * group.token_bytes("bfloat16")
        )
    assert sorted(layer for kind in kinds for layer in kind.layers) == list(range(cfg.num_layers))
    return kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planner_reads_the_kinds_that_the_engine_has(family):
    agree(make_config(family))


@pytest.mark.parametrize(
    "name", ["qwen2.5-3b", "mistral-7b", "llama-4-scout", "gemma-3-27b", "gpt-oss-120b", "deepseek-v3"]
)
def test_presets_are_read_alike(name):
    raw = PRESETS[name]
    kinds = agree({**raw, **raw.get("text_config", {}), "quantization_config": None})
    assert sum(len(kind.layers) for kind in kinds) == read_architecture(raw).num_layers


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("mistral", {"sliding_window": 64}, (sliding_window("window", (0, 1), 64),)),
        ("gemma3", {}, (full("full", (5,)), sliding_window("window", (0, 1, 2, 3, 4), 24))),
        ("gpt-oss", {"layer_types": ..., "num_hidden_layers": 4},
         (full("full", (1, 3)), sliding_window("window", (0, 2), 24))),
        ("llama4", {}, (full("full", (3,)), chunked_local("chunk", (0, 1, 2), 32))),
        ("llama4", {"no_rope_layers": [0, 1, 0, 1]}, (full("full", (0, 2)), chunked_local("chunk", (1, 3), 32))),
    ],
)  # fmt: skip
def test_layers_of_one_rule_are_one_kind(family, overrides, expected):
    assert agree(make_config(family, **overrides)) == expected


def test_two_windows_are_two_kinds():
    cfg = read_config(make_config("mistral", sliding_window=64, num_hidden_layers=3))
    layers = list(cfg.layers)
    mixer = layers[1].mixer
    layers[1] = LayerConfig(type(mixer)(**{**vars(mixer), "span": 32}), layers[1].feed_forward)
    kinds, layouts = kinds_of(type(cfg)(**{**vars(cfg), "layers": tuple(layers)}), "bfloat16", 16)
    assert kinds == (sliding_window("window", (0, 2), 64), sliding_window("window-2", (1,), 32))
    assert layouts.keys() == {"window", "window-2"}


def test_gemma_reads_both_spellings_of_its_rotary_embeddings():
    old = make_config("gemma3", rope_scaling={"rope_type": "linear", "factor": 8.0})
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_local_base_freq", "rope_scaling")}
    new["rope_parameters"] = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    assert read_config(old) == read_config(new)
    ropes = [layer.mixer.rope for layer in read_config(old).layers]
    assert [(rope.theta, rope.type) for rope in ropes] == [(1e4, "default")] * 5 + [(1e6, "linear")]


@pytest.mark.parametrize(("family", "outer"), [("gemma3", "Gemma3"), ("llama4", "Llama4")])
def test_the_language_model_inside_a_multimodal_checkpoint(family, outer):
    inner = make_config(family, vocab_size=32)
    whole = {"architectures": [f"{outer}ForConditionalGeneration"], "text_config": inner}
    if family == "llama4":  # whose encoder is left out
        whole["vision_config"] = {}
    cfg, nested = read_config(inner), read_config(whole)
    assert nested.layers == cfg.layers
    params = init_params(cfg, 0, jnp.float32)
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors_from_params(cfg, params)}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in tensors
    again = params_from_tensors(nested, tensors, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, again, params)
