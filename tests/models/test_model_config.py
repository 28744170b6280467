"""Reading config.json: spellings, defaults, and refusals that say what is known."""

import dataclasses
import json

import pytest

from checkpoint_configs import LLAMA3_ROPE
from checkpoints import FAMILIES, make_config
from rootcellar import cli
from rootcellar.errors import ModelError
from rootcellar.models.config import load_config, read_config
from rootcellar.models.rope import RopeConfig


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_transformers_mean_the_same(family):
    old = make_config(family, torch_dtype="bfloat16")
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new["dtype"] = "bfloat16"
    spelled = {"rope_theta": old.get("rope_theta"), "rope_type": "default", **old.get("rope_scaling", {})}
    new["rope_parameters"] = old.get("rope_parameters", spelled)
    if family == "olmo3":  # by kind of layer
        sliding = {"rope_theta": old["rope_theta"], "rope_type": "default"}
        new["rope_parameters"] = {"full_attention": new["rope_parameters"], "sliding_attention": sliding}
    assert read_config(new) == read_config(old)
    assert read_config(old).dtype == "bfloat16"


def test_llama3_rope_is_read():
    cfg = read_config(make_config("llama3"))
    assert cfg.rope == cfg.layers[0].mixer.rope
    assert cfg.rope == RopeConfig(500000.0, "llama3", 8.0, 64, 1.0, 4.0)


def test_absent_fields_take_the_architecture_defaults():
    raw = make_config("llama2")
    for name in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_theta", "torch_dtype"):
        del raw[name]
    cfg = read_config(raw)
    attention = cfg.layers[0].mixer
    assert (attention.head_dim, attention.num_kv_heads, attention.rope.theta) == (64, 4, 10000.0)
    assert cfg.tie_word_embeddings is False
    raw = make_config("qwen3")
    del raw["head_dim"]
    assert read_config(raw).layers[0].mixer.head_dim == 128


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(5, {}, (5,)), ([5, 6], {}, (5, 6)), (None, {}, ()), (5, {"eos_token_id": [8, 7]}, (5, 7, 8)), (0, None, (0,))],
)
def test_end_of_text_ids(tmp_path, config, generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(make_config("qwen2", eos_token_id=config)))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("outer", "nested", "expected"),
    [([1, 106], None, (1, 106)), ([1, 106], 1, (1, 106)), (None, 1, (1,)), (106, [1], (1, 106)), (None, None, ())],
)
def test_a_nested_config_hides_no_end_of_text(outer, nested, expected):
    raw = make_config("gemma3", eos_token_id=nested)
    assert (
        read_config({"architectures": raw["architectures"], "eos_token_id": outer, "text_config": raw}).eos_token_ids
        == expected
    )


def test_switches_of_the_families():
    def switched(family, **overrides):
        layer = read_config(make_config(family, **overrides)).layers[0]
        switches = {**dataclasses.asdict(layer.mixer), "mlp_bias": layer.feed_forward.bias}
        return [n for n in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm") if switches[n]]

    assert switched("qwen2") == ["qkv_bias"]
    assert switched("qwen3") == ["qk_norm"]
    assert switched("llama2") == []
    assert switched("llama2", attention_bias=True, mlp_bias=True) == ["qkv_bias", "o_bias", "mlp_bias"]


def test_layers_of_nemotron_are_a_mixer_and_the_feed_forward_behind_it():
    config = make_config("nemotron-h")
    cfg = read_config(config)
    assert [(layer.feed_forward is None, layer.numbers) for layer in cfg.layers] == [
        (False, (0, 1)),
        (True, (2, 3)),
        (False, (3, 4)),
    ]
    named = ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]  # as transformers 5 writes it
    assert read_config({**config, "hybrid_override_pattern": None, "layers_block_type": named}) == cfg


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("M-M*", "names 4 layers, num_hidden_layers is 5"),
        ("-M-M*", "begin with a mixer"),
        ("M--M*", "one before each feed-forward"),
        ("MEM*-", "experts without gates"),
        ("M-MX-", "known letters"),
        (None, "does not say which layers|names 0 layers"),
    ],
)
def test_what_nemotron_cannot_be_is_named(pattern, message):
    with pytest.raises(ModelError, match=message):
        read_config(make_config("nemotron-h", hybrid_override_pattern=pattern))


@pytest.mark.parametrize(
    "overrides",
    [{"hidden_size_per_layer_input": 32}, {"num_kv_shared_layers": 1}, {"enable_moe_block": True},
     {"use_bidirectional_attention": True}, {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}],
)  # fmt: skip
def test_what_gemma4_cannot_be_is_named(overrides):
    with pytest.raises(ModelError, match=next(iter(overrides))):
        read_config(make_config("gemma4", **overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "unknown architecture.*GPT2LMHeadModel.*known: .*LlamaForCausalLM"),
        ({"architectures": None}, "none given.*known: "),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"vocab_size": 0}, "vocab_size must be .* at least 1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "'spiral' is not supported; known: default, linear"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3}}, "3 factors, and 32 pairs are turned"),
        (
            {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64},
            "needs the field 'long_factor'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs the field 'factor'"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": None}}, "llama3.*low_freq_factor"),
        ({"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "quantised weights .bitnet. are not supported"),
        ({"layer_types": ["full_attention", "spiral_attention"]}, "spiral_attention"),
        ({"torch_dtype": "int8"}, "dtype='int8' is not supported; known: float32"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_refusals_say_what_is_wrong(overrides, message):
    with pytest.raises(ModelError, match=message):
        read_config(make_config("qwen2", **overrides))


def test_a_sliding_window_counts_only_where_it_is_on():
    def spans(family, **overrides):
        layers = read_config(make_config(family, sliding_window=64, **overrides)).layers
        return [layer.mixer.span for layer in layers]

    assert spans("qwen2", use_sliding_window=False) == spans("qwen2") == [0, 0]
    assert spans("qwen2", use_sliding_window=True, max_window_layers=1) == [0, 64]
    assert spans("qwen2", use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]) == [64, 0]
    assert spans("mistral") == [64, 64]


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 2048),
        ({"rope_type": "linear", "factor": 2.5}, 5120),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        (LLAMA3_ROPE, 2048),
    ],
)
def test_context_length_follows_the_scaling(scaling, expected):
    assert read_config(make_config("llama2", rope_scaling=scaling)).context_length == expected


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("Qwen/Qwen3-0.6B", "'hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B') and give 'Qwen3-0.6B'"),
        ("/models/Qwen3-0.6B", None),
        ("models/here/Qwen3-0.6B", None),
        ("../models", None),
        ("Qwen3-0.6B", None),
    ],
    ids=["hub name", "path", "deeper path", "path upwards", "one word"],
)
def test_a_name_of_the_hub_is_told_what_to_run(tmp_path, monkeypatch, capsys, given, hint):
    """Nothing is fetched behind a user's back; who gives a name is told how."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no model folder") as caught:
        load_config(given)
    assert ("hf download" in str(caught.value)) == bool(hint)
    assert (hint or "") in str(caught.value)
    assert cli.main(["plan", given]) == cli.EXIT_MISTAKE
    said = capsys.readouterr().err
    assert ("fetch it ('hf download Qwen/Qwen3-0.6B config.json --local-dir Qwen3-0.6B')" in said) == bool(hint)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ModelError, match=r"no model folder .*nowhere"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"has no config[.]json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not an object"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make_config("qwen2", vocab_size=None)))
    with pytest.raises(ModelError, match=r"config\.json: the field 'vocab_size'"):
        load_config(tmp_path)
