"""Tunix itself, rolled out by an engine (``make test-trainers``)."""

# ruff: noqa: E402  (what may not be there is imported last)

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import make_checkpoint

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # Tunix's own
pytest.importorskip("tunix", reason="Tunix is not installed here (make test-trainers)")

from flax import nnx
from tunix.generate.tokenizer_adapter import TokenizerAdapter
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.rl.common import compute_per_token_logps
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.utils import is_sharing_weights

from rootcellar.integrations.tunix import RootcellarRollout

ROOT = Path(__file__).parents[2]
COMMON = {"num_layers": 2, "vocab_size": 512, "embed_dim": 256, "hidden_dim": 384, "num_heads": 4, "num_kv_heads": 2}
# Tunix's Llama turns by a base of a million, whatever its config says.
MODELS = {
    "qwen2": (qwen2, qwen2_params, {"head_dim": 64, "rope_theta": 1_000_000, "norm_eps": 1e-6}, {}),
    "qwen3": (qwen3, qwen3_params, {"head_dim": 128, "rope_theta": 1_000_000, "norm_eps": 1e-6}, {}),
    "llama2": (llama3, llama3_params, {"head_dim": 64, "rope_theta": 1_000_000, "norm_eps": 1e-5}, {"rope_theta": 1e6}),
}
PAD, EOS = 510, 511


class Words:
    """A tokenizer that writes ids as numbers."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def bos_id(self):
        return None

    def eos_id(self):
        return EOS

    def pad_id(self):
        return PAD


def actor_of(family, tmp_path, seed=0):
    """A model as Tunix holds it, and the folder that it was read from."""
    module, loader, options, config = MODELS[family]
    folder = make_checkpoint(family, tmp_path / f"{family}-{seed}", seed=seed, **config)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    model = loader.create_model_from_safe_tensors(
        str(folder), module.ModelConfig(**COMMON, **options), mesh, dtype=jnp.float32
    )
    return model, folder


def rollout_of(actor, folder, **options):
    return RootcellarRollout(
        rollout_actor=actor,
        tokenizer=TokenizerAdapter(Words()),
        mesh=None,
        rollout_config=CONFIG,
        model_path=str(folder),
        **{"max_total_tokens": 1024, "max_running_requests": 4, "chunked_prefill_size": 64, **options},
    )


CONFIG = RolloutConfig(max_tokens_to_generate=12, max_prompt_length=48, temperature=1.0, return_logprobs=True, seed=3)
PROMPTS = [" ".join(map(str, range(5, 5 + n))) for n in (40, 40, 17)]


def padded(tokens, length=12):
    rows = np.full((len(tokens), length), PAD, np.int32)
    for row, answer in zip(rows, tokens, strict=True):
        row[: len(answer)] = answer
    return rows


def trainers(actor, output):
    """The logprobs of a rollout as Tunix computes them."""
    graph, state = nnx.split(actor)
    answers = padded(output.tokens)
    return np.asarray(compute_per_token_logps(graph, state, output.left_padded_prompt_tokens, answers, PAD, EOS))


@pytest.mark.parametrize("family", sorted(MODELS))
def test_logprobs_are_those_of_tunixs_forward_before_and_after_an_update(family, tmp_path):
    actor, folder = actor_of(family, tmp_path)
    rollout = rollout_of(actor, folder)
    other, _ = actor_of(family, tmp_path, seed=7)
    for model in (actor, other, actor):
        if model is not actor or rollout.engine.status()["weight_version"] != "0":
            rollout.update_params(nnx.state(model, nnx.Param), (nnx.Param,))
        output = rollout.generate(PROMPTS, CONFIG)
        expected, answers = trainers(model, output), padded(output.tokens)
        scored = np.asarray(rollout.get_per_token_logps(output.left_padded_prompt_tokens, answers))
        for row, (tokens, said) in enumerate(zip(output.tokens, output.logprobs, strict=True)):
            n = len(tokens)
            np.testing.assert_allclose(said, expected[row, :n], atol=5e-5)
            np.testing.assert_allclose(scored[row, :n], expected[row, :n], atol=5e-5)
            assert not scored[row, n:].any()
    rollout.engine.shutdown()


def test_at_another_temperature_they_are_those_of_what_was_drawn(tmp_path):
    actor, folder = actor_of("qwen2", tmp_path)
    rollout = rollout_of(actor, folder)
    cooler = RolloutConfig(**{**vars(CONFIG), "temperature": 0.6})
    output = rollout.generate(PROMPTS, cooler)
    graph, state = nnx.split(actor)
    prompts, answers = output.left_padded_prompt_tokens, padded(output.tokens)
    expected = compute_per_token_logps(graph, state, prompts, answers, PAD, EOS, temperature=0.6)
    for row, said in enumerate(output.logprobs):
        np.testing.assert_allclose(said, np.asarray(expected)[row, : len(said)], atol=5e-5)
    rollout.engine.shutdown()


def test_token_in_token_out_and_text_too(tmp_path):
    actor, folder = actor_of("qwen2", tmp_path)
    rollout = rollout_of(actor, folder)
    texts = rollout.generate(PROMPTS, CONFIG)
    ids = rollout.generate([Words().encode(prompt) for prompt in PROMPTS], CONFIG)
    for one, other in zip(texts.tokens, ids.tokens, strict=True):
        assert one.tolist() == other.tolist()
        assert len(one) == 12
    assert texts.text == [Words().decode(answer) for answer in texts.tokens]
    assert texts.tokens[0].tolist() != texts.tokens[1].tolist()  # of one prompt, each with its own seed
    prompts = texts.left_padded_prompt_tokens
    assert prompts.shape == (3, 48)
    assert prompts[2].tolist() == [PAD] * 31 + list(range(5, 22))
    end = int(texts.tokens[0][5])
    stopping = RolloutConfig(**{**vars(CONFIG), "eos_tokens": [end]})
    stopped = rollout.generate(PROMPTS[:1], stopping)
    assert stopped.tokens[0].tolist() == texts.tokens[0][: texts.tokens[0].tolist().index(end) + 1].tolist()
    assert str(end) not in stopped.text[0].split()
    assert (rollout.pad_id(), rollout.eos_id()) == (PAD, EOS)
    rollout.engine.shutdown()


def test_weights_are_pushed_and_the_cache_has_gone_while_training(tmp_path):
    """Tunix pushes nothing to a rollout that shows it the trainer's own module."""
    actor, folder = actor_of("qwen2", tmp_path)
    rollout = rollout_of(actor, folder)
    assert is_sharing_weights(actor, actor)
    assert not is_sharing_weights(actor, rollout.model())
    rollout.generate(PROMPTS, CONFIG)
    assert rollout.engine.status()["released"] == ["kv_cache"]
    state = nnx.state(actor, nnx.Param)
    for _ in range(2):
        rollout.update_params(state, (nnx.Param,))
    compiled = rollout.engine.stats()["compilations"]
    with jax.transfer_guard("disallow_explicit"):  # as Tunix has it while it pushes
        rollout.update_params(state, (nnx.Param,))
    assert rollout.engine.stats()["compilations"] == compiled
    assert rollout.engine.status()["weight_version"] == "3"
    keeping = rollout_of(actor, folder, free_cache_engine=False)
    keeping.generate(PROMPTS, CONFIG)
    assert keeping.engine.status()["released"] == []
    for each in (rollout, keeping):
        each.engine.shutdown()


def test_adapters_are_refused(tmp_path):
    actor, folder = actor_of("qwen2", tmp_path)
    rollout = rollout_of(actor, folder)
    with pytest.raises(ValueError, match="LoRA"):
        rollout.update_params({}, (nnx.LoRAParam,))
    rollout.engine.shutdown()


def test_grpo_makes_the_reward_rise_with_the_radix_cache_on():
    command = [sys.executable, ROOT / "examples" / "tunix_grpo.py", "--rollout", "both"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = done.stdout.splitlines()[-1]
    print(line)
    theirs, ours, noise = map(float, re.findall(r"[-+]?\d+\.\d{4}", line))
    assert abs(theirs - ours) < 3 * noise + 0.15  # of two runs of one training, each with draws of its own
    pattern = r"step +(\d+): reward ([-+][\d.]+), weights (\d+), released \['kv_cache'\], cached (\d+) of (\d+)"
    steps = re.findall(pattern, done.stdout)
    assert len(steps) >= 20
    assert [int(version) for _, _, version, _, _ in steps] == list(range(len(steps)))  # pushed after each step
    rewards = [float(reward) for _, reward, *_ in steps]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.3
    cached, asked = map(int, steps[-1][3:])
    assert cached > asked / 2
    found = re.findall(r"largest difference of logprobs (?:before|after) [\w ]+: ([\d.e+-]+)", done.stdout)
    before, after = map(float, found)
    assert max(before, after) < 5e-5  # of tokens that are far from likely, too
    assert before > 0  # two programs, which do not round alike


def test_tokens_have_our_forwards_bits_and_tunixs_logprobs():
    """A thousand of them at each temperature; without ``--tokens`` the benchmark takes ten.

    Compiled as for users: in a hurry (``conftest.HASTY``) XLA rounds otherwise, Tunix's forward and ours.
    """
    command = [sys.executable, ROOT / "benchmarks" / "rollout_logprobs.py", "--json", "--tokens", "1000"]
    unhurried = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=unhurried)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    fixed = [row for row in rows if row["deterministic"]]
    assert {row["temperature"] for row in fixed} == {0.6, 1.0}
    for row in fixed:
        assert row["tokens"] >= 1000
        assert row["ours"] == 0
        assert row["float64"] <= 1e-5
        # Nobody can be nearer to Tunix than its own forward is to the truth: with AVX-512 that is 1.1e-5.
        theirs_off = row["Tunix beside float64"]
        assert 0 < row["Tunix"] <= (1e-5 if theirs_off <= 5e-6 else 5e-6 + theirs_off)
    # Both round as float32 does, each otherwise.
    assert all(max(row["float64"], row["Tunix beside float64"]) < 2e-5 for row in rows)
