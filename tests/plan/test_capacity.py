"""The capacity planner: figures that the field agrees on, configs it must understand, and its command line."""

import argparse
import json
import re
from dataclasses import replace

import pytest

from rootcellar import cli
from rootcellar.commands import plan as command
from rootcellar.config import EngineConfig
from rootcellar.errors import ConfigError
from rootcellar.options import options_of
from rootcellar.plan.capacity import Ask, capacity, what_if
from rootcellar.plan.grids import NARROW
from rootcellar.plan.layers import read_architecture
from rootcellar.plan.presets import PRESETS
from rootcellar.plan.weights import weight_bytes
from rootcellar.pools.layouts import layout_of, page_bytes
from rootcellar.units import gb, parse_bytes

SCOUT_KV = parse_bytes("89.71GiB", "kv_bytes_per_device")


def preset(name, **changes):
    return read_architecture({**PRESETS[name], **changes})


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "full", "hybrid", "constant"),
    [
        ("qwen2.5-3b", 36_864, 36_864, 0),
        ("llama-4-scout", 196_608, 49_152, 8192 * 147_456),
        ("gemma-3-27b", 507_904, 81_920, 436_207_616),
        ("gpt-oss-120b", 73_728, 36_864, 4_718_592),
        ("deepseek-v3", 70_272, 70_272, 0),
        ("mistral-7b", 131_072, 0, 4096 * 131_072),
        # Mamba 2: 29 layers of (8192 + 2 * 128) channels x 3 taps in bfloat16 and a float32 state of 128 x 64 x 128.
        ("bamba-9b", 12_288, 12_288, 29 * (8448 * 3 * 2 + 128 * 64 * 128 * 4)),
    ],
)
def test_bytes_per_token_and_per_request(name, full, hybrid, constant):
    figures = capacity(Ask(preset(name)))
    assert figures.bytes_per_token_full == full
    assert figures.bytes_per_token_hybrid == hybrid
    assert figures.constant_bytes_per_request == constant
    assert figures.max_total_num_tokens is None
    assert figures.concurrency is None


def test_fewer_kv_heads_than_devices_are_repeated():
    """What dropping the cache of Qwen2.5-3B on four TPU chips gave back: 2,415,992,832 bytes."""
    figures = capacity(Ask(preset("qwen2.5-3b"), tp=4, devices=4, page_size=1, max_total_tokens=32768))
    assert figures.bytes_per_token_all_devices == 73_728
    assert figures.kv_cache_bytes_all_devices == 2_415_992_832


@pytest.mark.parametrize(("tp", "heads"), [(1, 8), (4, 2), (8, 1), (16, 1), (3, 8), (64, 1), (128, 8)])
def test_heads_are_split_repeated_or_kept_whole(tp, heads):
    """gpt-oss has 8 KV heads of 64, each shared by 8 query heads: no more than 64 devices have one of their own."""
    figures = capacity(Ask(preset("gpt-oss-120b"), tp=tp, devices=tp))
    assert figures.bytes_per_token_per_device == 36 * 2 * heads * 64 * 2


def test_a_latent_is_not_split():
    figures = capacity(Ask(preset("deepseek-v3"), tp=8, devices=8))
    assert figures.bytes_per_token_per_device == 70_272


def test_a_state_does_not_follow_the_dtype_of_the_kv_cache_and_is_not_split():
    model = preset("bamba-9b")
    assert capacity(Ask(model, kv_cache_dtype="fp8_e4m3")).constant_bytes_per_request == 123_104_768
    (cost,) = (c for c in Ask(model, tp=4, devices=4).costs() if c.recurrent)
    assert cost.page_bytes == 29 * ((8192 + 256) * 3 * 2 + 128 * 64 * 128 * 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", *NARROW])
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_what_a_state_takes_is_what_its_layout_has(activations, dtype):
    """Whatever the activations are, its convolution's inputs are of the KV cache's type, or wide beside few bits."""
    model = preset("bamba-9b", torch_dtype=activations)
    (group,) = (g for g in model.groups if g.kind.rule == "recurrent")
    (cost,) = (c for c in Ask(model, kv_cache_dtype=dtype).costs() if c.recurrent)
    assert cost.page_bytes == 29 * page_bytes(layout_of(group.stored, dtype, 1))


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "requests"), [(5_242_880, 2.96), (8_388_608, 1.86)])
def test_concurrency_is_that_of_vllms_hybrid_manager(length, requests):
    ask = Ask(preset("llama-4-scout"), tp=8, devices=8, kv_bytes_per_device=SCOUT_KV, request_length=length)
    figures = capacity(ask)
    assert figures.concurrency == pytest.approx(requests, rel=0.01)
    assert figures.max_total_num_tokens == pytest.approx(3_919_664, rel=0.001)


def test_without_the_hybrid_manager_a_request_of_five_million_tokens_does_not_fit():
    ask = Ask(preset("llama-4-scout"), tp=8, devices=8, kv_bytes_per_device=SCOUT_KV, request_length=5_242_880)
    assert capacity(ask).concurrency_all_full == pytest.approx(0.75, rel=0.01)


def test_the_ratio_that_suits_a_request_makes_the_division_as_good_as_shared_pages():
    ask = Ask(preset("llama-4-scout"), tp=8, devices=8, kv_bytes_per_device=SCOUT_KV, request_length=5_242_880)
    ask = replace(ask, chunked_prefill_size=8192)
    rows = dict(what_if(ask))
    suited = rows[f"swa_full_tokens_ratio={1024 / 327680:.4g}"]
    assert capacity(ask).concurrency_as_divided == pytest.approx(0.7476, rel=1e-3)
    assert suited.concurrency_as_divided == pytest.approx(suited.concurrency, rel=1e-3)


def test_what_if_covers_dtype_tp_and_window():
    rows = dict(what_if(Ask(preset("gemma-3-27b"), tp=2, devices=2, kv_bytes_per_device=10**10)))
    assert rows["kv_cache_dtype=fp8_e4m3"].bytes_per_token_full == 507_904 // 2 * 130 // 128  # scales: 2 bytes each
    assert rows["window=512"].constant_bytes_per_request == 436_207_616 // 2
    assert rows["tp=4"].bytes_per_token_per_device == 507_904 // 4
    assert rows["all layers full"].bytes_per_token_hybrid == 507_904


def test_the_host_tier_is_a_multiple_of_the_device():
    ask = Ask(preset("qwen2.5-3b"), kv_bytes_per_device=10**10, hicache_ratio=2.5)
    figures = capacity(ask)
    page = 16 * figures.bytes_per_token_per_device
    pages = int(2.5 * (figures.kv_cache_bytes_per_device // page - 1))  # as the engine allocates: none is for padding
    assert figures.host_bytes_per_device == pages * page
    assert figures.host_tokens <= 2.5 * figures.max_total_num_tokens < figures.host_tokens + 16
    sized = capacity(Ask(preset("qwen2.5-3b"), kv_bytes_per_device=10**10, hicache_size=10**11))
    assert sized.hicache_ratio == pytest.approx(10, rel=1e-3)


def test_every_figure_has_a_formula():
    for name in PRESETS:
        figures = capacity(Ask(preset(name), tp=8, devices=8, hbm=141 * 10**9, hicache_ratio=1.0))
        unexplained = {k for k, v in figures.as_dict().items() if v is not None} - set(figures.formulas)
        assert unexplained == {"formulas", "request_length", "replicas"}


# --- hardware ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),  # the published checkpoints, without the vision tower
    [
        ("qwen2.5-3b", 6.172),
        ("mistral-7b", 14.483),
        ("llama-4-scout", 215.5),
        ("gemma-3-27b", 54.0),
        ("gpt-oss-120b", 65.25),
        ("deepseek-v3", 671.0),
        ("bamba-9b", 19.56),
    ],
)
def test_weights_are_counted_within_one_percent(name, billions):
    assert weight_bytes(preset(name)) / 1e9 == pytest.approx(billions, rel=0.01)


def test_memory_is_usable_bytes_less_weights_and_activations():
    ask = Ask(preset("qwen2.5-3b"), tp=2, devices=4, hbm=24 * 10**9, weight_bytes=6 * 10**9, activation_bytes=10**9)
    figures = capacity(ask)
    assert figures.kv_bytes_per_device == int(24e9 * 0.9) - 3 * 10**9 - 10**9
    assert figures.kv_cache_bytes_per_device <= figures.kv_bytes_per_device
    assert figures.kv_bytes_per_device - figures.kv_cache_bytes_per_device < 36_864 // 2 * 16
    assert figures.replicas == 2


def test_what_does_not_fit_is_refused_with_the_numbers():
    said = (
        r"^Not enough memory: of 4.00 GB x 0.9 the weights take 6.17 GB and the activations of a prefill of 512 tokens "
        r"0.79 GB, so 3.36 GB are lacking .* Raise mem_fraction_static, hbm or tp\.$"
    )
    with pytest.raises(ConfigError, match=said):
        capacity(Ask(preset("qwen2.5-3b"), hbm=4 * 10**9))
    with pytest.raises(ConfigError, match=r"the smallest one takes"):
        capacity(Ask(preset("qwen2.5-3b"), kv_bytes_per_device=10**9, max_total_tokens=10**6))


def test_activations_that_leave_nothing_are_named_with_the_prefill_that_fits():
    ask = Ask(preset("qwen2.5-3b"), hbm=8 * 10**9, chunked_prefill_size=8192)
    with pytest.raises(ConfigError, match=r"activations of a prefill of 8192 tokens 6\.66 GB") as refused:
        capacity(ask)
    (fits,) = re.findall(r"Lower chunked_prefill_size \(--chunked-prefill-size\) to (\d+)", str(refused.value))
    assert capacity(replace(ask, chunked_prefill_size=int(fits))).max_total_num_tokens > 0
    with pytest.raises(ConfigError):
        capacity(replace(ask, chunked_prefill_size=2 * int(fits)))


def test_what_is_not_said_is_planned_with_the_engines_defaults():
    parser = argparse.ArgumentParser()
    command.configure(parser)
    said = vars(parser.parse_args(["qwen2.5-3b"]))
    for name in ("page_size", "chunked_prefill_size", "swa_full_tokens_ratio", "mamba_full_memory_ratio"):
        default = options_of(EngineConfig)[name].default
        assert said[name] == getattr(Ask(preset("qwen2.5-3b")), name) == default, name
    assert said["mem_fraction_static"] == options_of(EngineConfig)["mem_fraction_static"].default


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size"])
def test_a_field_that_weights_need_is_named(name):
    raw = {key: value for key, value in PRESETS["gpt-oss-120b"].items() if key != name}
    with pytest.raises(ConfigError, match=f"lacks '{name}'"):
        capacity(Ask(read_architecture(raw), hbm=10**11))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tp": 4, "devices": 6}, "no multiple of tp=4"),
        ({"hbm": 10**9, "kv_bytes_per_device": 10**9}, "not both"),
        ({"mem_fraction_static": 1.5}, r"must be in \(0, 1\]"),
        ({"swa_full_tokens_ratio": 0.0}, r"must be in \(0, 1\]"),
        ({"kv_cache_dtype": "int3"}, "choose from auto, float32, bfloat16"),
        ({"page_size": 0}, "page_size=0"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        capacity(Ask(preset("gpt-oss-120b"), **changes))


# --- configs ----------------------------------------------------------------------------------------------------------

BASE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "vocab_size": 100,
    "intermediate_size": 128,
}
MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, {"full": range(8)}),
        ({"sliding_window": 32}, {"window": range(8)}),
        ({"sliding_window": 32, "use_sliding_window": False}, {"full": range(8)}),
        ({"sliding_window": 32, "max_window_layers": 6}, {"full": range(6), "window": range(6, 8)}),
        ({"sliding_window": 32, "sliding_window_pattern": 4}, {"full": (3, 7), "window": (0, 1, 2, 4, 5, 6)}),
        ({"sliding_window": 32, "model_type": "gemma2"}, {"full": (1, 3, 5, 7), "window": (0, 2, 4, 6)}),
        ({"sliding_window": None, "layer_types": ["sliding_attention"] * 8}, {"full": range(8)}),
        ({"attention_chunk_size": 32, "no_rope_layers": [1, 0] * 4}, {"full": (1, 3, 5, 7), "chunk": (0, 2, 4, 6)}),
        ({**MAMBA, "attn_layer_period": 4, "attn_layer_offset": 2}, {"full": (2, 6), "recurrent": (0, 1, 3, 4, 5, 7)}),
        ({**DELTA, "full_attention_interval": 4}, {"full": (3, 7), "recurrent": (0, 1, 2, 4, 5, 6)}),
        ({**MAMBA, "layers_block_type": ["mamba", "attention"] * 4}, {"full": (1, 3, 5, 7), "recurrent": (0, 2, 4, 6)}),
    ],
)
def test_which_layers_are_of_which_kind(changes, layers):
    model = read_architecture({**BASE, **changes})
    assert {g.kind.name: g.kind.layers for g in model.groups} == {name: tuple(ids) for name, ids in layers.items()}
    assert weight_bytes(model) > 0


def test_states_of_mamba_1_and_gated_delta():
    jamba = read_architecture({**BASE, **MAMBA, "attn_layer_period": 4})
    qwen = read_architecture({**BASE, **DELTA, "full_attention_interval": 4})
    assert jamba.groups[1].state_bytes("bfloat16") == 6 * (128 * 3 * 2 + 128 * 16 * 4)
    assert qwen.groups[1].state_bytes("bfloat16") == 6 * ((32 + 2 * 16) * 3 * 2 + 4 * 8 * 8 * 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
        ({"layer_types": ["full_attention", "telepathy"] * 4}, "telepathy"),
        ({"layer_types": ["full_attention"]}, "8 layers"),
        ({"layer_types": ["chunked_attention"] * 8}, "lacks 'attention_chunk_size'"),
        (MAMBA, "does not say which layers are recurrent"),
        ({**MAMBA, "layer_types": ["mamba"] * 8}, "no attention layers"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_rather_than_guessed_at(changes, said):
    with pytest.raises(ConfigError, match=said):
        read_architecture({**BASE, **changes})


# --- units and the command line ---------------------------------------------------------------------------------------


def test_units():
    assert parse_bytes("141GB", "hbm") == 141 * 10**9
    assert parse_bytes("89.71GiB", "hbm") == 9632537903104 // 100
    assert parse_bytes(" 512 MiB ", "hbm") == 512 * 2**20
    assert parse_bytes("1000", "hbm") == 1000
    assert gb(2_415_992_832) == "2.42"
    for wrong in ("", "GB", "4 elephants", "-1GB", "0", "1e9"):
        with pytest.raises(ConfigError, match="hbm="):
            parse_bytes(wrong, "hbm")


def test_the_command_prints_the_figures_as_json(capsys):
    words = ["--devices", "8", "--tp", "8", "--kv-bytes-per-device", "89.71GiB", "--request-length", "5242880"]
    assert cli.main(["plan", "llama-4-scout", *words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bytes_per_token_full"] == 196_608
    assert answer["bytes_per_token_hybrid"] == 49_152
    assert answer["constant_bytes_per_request"] == 1_207_959_552
    assert answer["max_total_num_tokens"] == pytest.approx(3_919_664, rel=0.001)
    assert answer["concurrency"] == pytest.approx(2.96, rel=0.01)
    assert {row["change"] for row in answer["what_if"]} >= {"tp=4", "window=4096", "kv_cache_dtype=fp8_e4m3"}


def test_the_command_prints_a_table_and_reads_files_and_folders(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["qwen2.5-3b"]))
    for model in (tmp_path, tmp_path / "config.json"):
        assert cli.main(["plan", str(model), "--hbm", "24GB"]) == 0
        shown = capsys.readouterr().out
        assert "36,864  = 36 layers x 2 x 2 KV heads x 128 x 2 bytes" in shown
        assert "24.00 GB x 0.9 - 6.17 GB weights" in shown
        assert "what if" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope"], "no preset and cannot be read"),
        (["qwen2.5-3b", "--hbm", "lots"], "hbm='lots'"),
        (["qwen2.5-3b", "--request-length", "0"], "request_length=0"),
        (["qwen2.5-3b", "--hbm", "4GB"], "Not enough memory"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, said, capsys):
    assert cli.main(["plan", *words]) == cli.EXIT_MISTAKE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_files_that_are_no_config(tmp_path, capsys):
    for text, said in (("{", "is not JSON"), ("[]", "holds list")):
        (tmp_path / "config.json").write_text(text)
        assert cli.main(["plan", str(tmp_path)]) == cli.EXIT_MISTAKE
        assert said in capsys.readouterr().err
