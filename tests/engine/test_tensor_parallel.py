"""Tensor parallelism over virtual devices: the answers of transformers, whatever the number of devices and KV heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from checkpoints import golden
from rootcellar.errors import ConfigError
from rootcellar.models.config import read_config
from rootcellar.runner import Placement

SCRIPT = Path(__file__).with_name("tensor_parallel.py")


def run(folder, tp_size, prompts):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, str(tp_size)],
        input=json.dumps(prompts), env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "tp_size", "heads_on_each"),
    [
        ("qwen2-4kv", 2, 2),
        ("qwen2-4kv", 4, 1),
        ("qwen3-tied-1kv-d128", 4, 1),
        ("llama2", 4, 1),
        ("gpt-oss", 4, 1),
        pytest.param("gemma3", 2, 1, marks=pytest.mark.long),
        pytest.param("llama4", 2, 1, marks=pytest.mark.long),
    ],
)
def test_answers_equal_transformers(name, tp_size, heads_on_each, tmp_path):
    case = golden(name)
    case.make(tmp_path)
    result = run(tmp_path, tp_size, case.prompts)
    assert result["devices"] == 4
    for answers in result["output_ids"]:  # cold, from the cache, and after dropping it
        assert answers == case.tokens
    assert result["cached"] == [(len(p) - 1) // 16 * 16 for p in case.prompts]
    shards = result["on_each_device"]
    assert [s[2] for s in shards] == [heads_on_each]
    assert result["pool"][2] == tp_size * heads_on_each


@pytest.mark.parametrize("name", ["bamba", pytest.param("qwen3-next", marks=pytest.mark.long)])
def test_recurrent_layers_are_whole_on_each_device_and_attention_beside_them_is_split(name, tmp_path):
    case = golden(name)
    case.make(tmp_path)
    result = run(tmp_path, 2, case.prompts)
    for answers in result["output_ids"]:
        assert answers == case.tokens
    assert result["cached"][-1] == 96
    assert [s[2] for s in result["on_each_device"]] == [1]
    assert result["compiled_by_rebuild"] == 0


def test_latents_are_whole_on_each_device_and_no_expert_is_gathered(tmp_path):
    case = golden("deepseek3")
    case.make(tmp_path)
    result = run(tmp_path, 2, case.prompts)
    assert all(answers == case.tokens for answers in result["output_ids"])
    assert result["on_each_device"] == [result["pool"]]
    logits = 16 * 512  # the largest decode step's
    assert 0 < result["gathered"] <= logits


def config(heads, kv_heads):
    return read_config(
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 64, "hidden_size": 64,
            "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
            "rope_theta": 1e4, "tie_word_embeddings": True,
        },
        {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size", "copies", "splits"),
    [(16, 2, 4, 2, True), (8, 1, 4, 4, True), (8, 8, 4, 1, True), (6, 3, 4, 1, False), (4, 2, 8, 1, False)],
)
def test_few_kv_heads_are_repeated_and_odd_ones_kept_whole(monkeypatch, heads, kv_heads, tp_size, copies, splits):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    placement = Placement(config(heads, kv_heads), tp_size)
    assert placement.splits_heads is splits
    assert placement.served.layers[0].mixer.num_kv_heads == kv_heads * copies


def test_more_devices_than_there_are():
    with pytest.raises(ConfigError, match="lower tp_size"):
        Placement(config(8, 8), 64)
