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
from rootcellar.plan.grids import NARROW
from rootcellar.runner import Placement

SCRIPT = Path(__file__).with_name("tensor_parallel.py")


MOST = 32
"""Tokens of an answer."""


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """A process with four virtual devices: its end to write questions to, and what reads an answer or says why not."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    errors = tmp_path_factory.mktemp("devices") / "errors"
    with (
        errors.open("w") as said,
        subprocess.Popen(
            [sys.executable, SCRIPT], env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(SCRIPT.parents[1])},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
        ) as process,
    ):  # fmt: skip

        def ask(**question):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, errors.read_text()[-3000:]
            return json.loads(line)

        yield ask
        process.stdin.close()


@pytest.fixture
def run(devices, tmp_path):
    """What a golden checkpoint answers on so many devices to a quarter of its prompts, and what it must."""

    def run(name, tp_size, guessed=False):
        case = golden(name)
        case.make(tmp_path)
        prompts = case.prompts[::5]  # from the shortest to the longest
        expected = [tokens[:MOST] for tokens in case.tokens[::5]]
        guesses = {"said": expected} if guessed else {}
        result = devices(folder=str(tmp_path), tp_size=tp_size, prompts=prompts, most=MOST, **guesses)
        assert result["output_ids"] == [expected] * 3  # cold, from the cache, and after dropping it
        return prompts, result

    return run


@pytest.mark.parametrize(
    ("name", "tp_size", "heads_on_each"),
    [
        ("qwen2-4kv", 2, 2),
        ("gpt-oss", 4, 1),
        pytest.param("qwen3-tied-1kv-d128", 4, 1, marks=pytest.mark.long),
        pytest.param("qwen2-4kv", 4, 1, marks=pytest.mark.long),
        pytest.param("llama2", 4, 1, marks=pytest.mark.long),
        pytest.param("gemma3", 2, 1, marks=pytest.mark.long),
        pytest.param("gemma4", 2, 1, marks=pytest.mark.long),  # one head of keys, which are values, is repeated
        pytest.param("llama4", 2, 1, marks=pytest.mark.long),
        pytest.param("qwen2-moe", 2, 1, marks=pytest.mark.long),
        pytest.param("qwen3-moe", 2, 1, marks=pytest.mark.long),
        pytest.param("glm4-moe", 2, 1, marks=pytest.mark.long),
    ],
)
def test_answers_equal_transformers(run, name, tp_size, heads_on_each):
    prompts, result = run(name, tp_size)
    assert result["devices"] == 4
    assert result["cached"] == [(len(p) - 1) // 16 * 16 for p in prompts]
    shards = result["on_each_device"]
    assert [s[2] for s in shards] == [heads_on_each]
    assert result["pool"][2] == tp_size * heads_on_each


@pytest.mark.parametrize(
    "name", ["bamba", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen3-next", "granite4"))]
)
def test_recurrent_layers_are_whole_on_each_device_and_attention_beside_them_is_split(run, name):
    _, result = run(name, 2)
    assert result["cached"][-1] == 96
    assert [s[2] for s in result["on_each_device"]] == [1]
    assert result["compiled_by_rebuild"] == 0


def test_guesses_are_verified_with_states_that_are_whole_on_each_device(run):
    _, result = run("bamba", 2, guessed=True)
    right, guessed = result["guessed"]
    assert 0 < right < guessed
    assert result["cached"][-1] == 96
    assert result["compiled_by_rebuild"] == 0


def test_latents_are_whole_on_each_device_and_no_expert_is_gathered(run):
    _, result = run("deepseek3", 2)
    assert result["on_each_device"] == [result["pool"]]
    logits = 2 * 512  # the largest decode step's
    assert 0 < result["gathered"] <= logits


@pytest.mark.parametrize(
    "name", ["gpt-oss", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen3-moe", "granite4", "llama4"))]
)
def test_experts_that_a_trainer_sends_are_split_as_those_that_were_read(devices, tmp_path, name):
    case = golden(name)
    case.make(tmp_path)
    result = devices(folder=str(tmp_path), tp_size=2, prompts=case.prompts[::5], most=MOST, given=True)
    random, *given = result["output_ids"]
    expected = [tokens[:MOST] for tokens in case.tokens[::5]]
    assert random != expected
    assert given == [expected] * 2
    assert any("experts_gate_up" in parameter for parameter in result["copied"][1])


@pytest.mark.parametrize(
    "name",
    [
        "qwen2-4kv",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("qwen3-tied-1kv-d128", "gemma3", "llama4", "deepseek3", "bamba", "qwen3-next")
        ),
    ],
)
def test_what_one_number_of_devices_stored_another_reads(devices, tmp_path, name):
    case = golden(name)
    case.make(tmp_path / "model")

    def found(tp_size, some):
        """Of each prompt cached tokens by tier: at first, and with nothing on the device."""
        result = devices(
            folder=str(tmp_path / "model"), tp_size=tp_size, prompts=[case.prompts[i] for i in some], most=MOST,
            store=str(tmp_path / "pages"),
        )  # fmt: skip
        assert result["output_ids"] == [[case.tokens[i][:MOST] for i in some]] * 2
        assert each(details["host"] > 0 for details in result["found"][1])
        return result["found"][0]

    # A window or a chunk that has moved on is kept nowhere: such a prompt may find nothing, or what another brought.
    each = any if name in ("gemma3", "llama4") else all

    assert [details["storage"] for details in found(1, [11, 13])] == [0, 0]
    assert all(details["storage"] > 0 for details in found(2, [11, 13, 14, 15])[:2])
    assert each(details["storage"] > 0 for details in found(1, [14, 15]))


@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=[pytest.mark.long] if dtype != "k8v4" else []) for dtype in NARROW]
)
def test_what_one_number_of_devices_stored_in_few_bits_another_reads(devices, tmp_path, dtype):
    case = golden("qwen2-4kv")
    case.make(tmp_path / "model")
    asked = {"folder": str(tmp_path / "model"), "most": 16, "prompts": [case.prompts[i] for i in (11, 14)]}
    asked |= {"store": str(tmp_path / "pages"), "kv_cache_dtype": dtype}
    one, two = (devices(tp_size=tp_size, **asked) for tp_size in (1, 2))
    assert one["output_ids"] == two["output_ids"] == [one["output_ids"][0]] * 2
    assert [details["storage"] > 0 for details in one["found"][0] + two["found"][0]] == [False, False, True, True]


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_no_device_ever_has_more_of_the_weights_than_its_part(devices, tmp_path, load_format):
    """Else a model that several devices have room for could not be loaded by them."""
    golden("gpt-oss").make(tmp_path)
    result = devices(folder=str(tmp_path), tp_size=4, load_format=load_format)
    assert all(len(set(on_each)) == 1 for on_each in result["times"])  # what is whole on one is nowhere else
    assert max(result["times"]) == result["weights"]
    assert 0 < result["weights"][0] < result["whole"] / 2  # a part of most, and of some the whole


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
