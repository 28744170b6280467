"""Configs of DeepSeek V2 and V3: what the published ones mean and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import make_checkpoint, make_config
from rootcellar.errors import ModelError
from rootcellar.models.config import load_config, read_config
from rootcellar.models.feed_forward import Dense
from rootcellar.models.loader import load_params
from rootcellar.models.params import abstract_params, count_bytes, init_params
from rootcellar.ops.experts import Router

COMMON = {
    "attention_bias": False, "first_k_dense_replace": 1, "hidden_act": "silu", "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_layer_freq": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
V2 = {
    **COMMON, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 5120,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8, "n_routed_experts": 160,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 128, "num_experts_per_tok": 6,
    "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "scoring_func": "softmax", "topk_group": 3,
    "topk_method": "group_limited_greedy",
}  # fmt: skip
V2_LITE = {
    **V2, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
V3 = {
    **COMMON, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 3,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "routed_scaling_factor": 2.5, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280,
}  # fmt: skip


@pytest.mark.parametrize(("raw", "billions"), [(V2, 235.7), (V2_LITE, 15.7), (V3, 671.0)], ids=["v2", "lite", "v3"])
def test_published_models_have_the_published_number_of_parameters(raw, billions):
    assert count_bytes(read_config(raw), jnp.float32) / 4e9 == pytest.approx(billions, abs=0.06)


def test_scores_are_sharpened_where_the_context_is_stretched():
    """DeepSeek's softmax_scale: (qk head dim)^-1/2 times yarn's mscale squared."""
    assert read_config(V3).layers[0].mixer.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert read_config(V2).layers[0].mixer.scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)
    plain = {k: v for k, v in V3.items() if k != "rope_scaling"}
    assert read_config(plain).layers[0].mixer.scale == pytest.approx(192**-0.5)
    assert read_config(V3).rope.attention_factor == 1.0
    assert read_config(V3).context_length == 163840


def test_layers_and_routers():
    v2, lite, v3 = map(read_config, (V2, V2_LITE, V3))
    assert [isinstance(layer.feed_forward, Dense) for layer in v3.layers] == [True] * 3 + [False] * 58
    assert v2.layers[1].feed_forward.router == Router(160, 6, scale=16.0, groups=8, top_groups=3)
    assert lite.layers[1].feed_forward.router == Router(64, 6)
    assert v3.layers[3].feed_forward.router == Router(256, 8, "sigmoid", True, 2.5, True, 8, 4)
    assert lite.layers[1].feed_forward.shared == Dense(2816)
    assert (lite.layers[0].mixer.q_rank, v3.layers[0].mixer.q_rank) == (None, 1536)
    assert v3.layers[0].mixer.rope.interleaved
    assert not read_config({**V3, "rope_interleave": False}).layers[0].mixer.rope.interleaved
    assert read_config({**V2_LITE, "n_shared_experts": None}).layers[1].feed_forward.shared is None


def test_the_correction_of_the_router_stays_float32(tmp_path):
    """Its values may be large and their differences small: rounded to bfloat16, other experts would be chosen."""
    make_checkpoint("deepseek3", tmp_path, vocab_size=32)
    cfg = load_config(tmp_path)
    narrow, wide = (load_params(tmp_path, cfg, dtype)["layers"][1] for dtype in (jnp.bfloat16, jnp.float32))
    assert narrow["correction"].dtype == jnp.float32
    np.testing.assert_array_equal(narrow["correction"], wide["correction"])
    assert narrow["router"].dtype == jnp.bfloat16
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(f(cfg, jnp.bfloat16))] for f in (abstract_params, dummy)]
    assert dtypes[0] == dtypes[1]
    assert dtypes[0].count(jnp.float32) == 1
    assert count_bytes(cfg, jnp.bfloat16) == count_bytes(cfg, jnp.float32) // 2 + 16 * 2


def dummy(cfg, dtype):
    return init_params(cfg, 0, dtype)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("deepseek2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'.*'greedy', 'group_limited_greedy'"),
        ("deepseek3", {"topk_method": "greedy"}, "topk_method='greedy'.*'noaux_tc'"),
        ("deepseek3", {"scoring_func": "softmax"}, "scoring_func='softmax'.*'sigmoid'"),
        ("deepseek2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek3", {"n_group": 3}, "groups=3"),
        ("deepseek3", {"topk_group": 5}, "top_groups=5"),
        ("deepseek2", {"num_experts_per_tok": 17}, "top_k=17"),
        ("deepseek2", {"num_experts_per_tok": None}, "'num_experts_per_tok' is missing"),
        ("deepseek3", {"qk_rope_head_dim": 15}, "qk_rope_head_dim=15: .* must be even"),
        ("deepseek3", {"kv_lora_rank": 0}, "kv_lora_rank must be"),
    ],
)
def test_refusals_say_what_is_wrong(family, overrides, message):
    with pytest.raises(ModelError, match=message):
        read_config(make_config(family, **overrides))
