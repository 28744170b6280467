"""GRPO with Tunix, rolled out by an engine: the reward rises, the cache is used, and training has its memory.

    pip install 'rootcellar[tunix]' && python examples/tunix_grpo.py
    python examples/tunix_grpo.py --rollout both --runs 4   # Tunix's own sampler first, in its place, with four seeds
    make test-trainers                             # the same in an environment of its own, as a test

The policy is the embedded demo model, held by Tunix as its own Qwen 2; the reward wants answers of 40 characters. What
matters is what goes on between the two: a group's answers share the pages of their prompt, all prompts those of the
system message; the KV cache is given up before the optimiser runs; the new weights are made the engine's on the device.
First and last it compares the engine's logprobs with those of Tunix's forward. ``--rollout both`` does it with each, in
turns, and compares them in its last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix import ClusterConfig, GRPOConfig, GRPOLearner, RLCluster, RLTrainingConfig, Role, RolloutConfig
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2.params import create_model_from_safe_tensors
from tunix.rl.common import compute_per_token_logps

from rootcellar import demo
from rootcellar.integrations.tunix import RootcellarRollout
from rootcellar.text import Tokenizer

SYSTEM = "You are the manual of rootcellar, an LLM inference engine. Answer in one or two short sentences."
QUESTIONS = ["What is a KV cache?", "What does page_size do?", "What is a radix tree?", "What is a lease?"]
GROUP = 4  # answers to each question
LONGEST = 24  # tokens of an answer


class Words:
    """The demo model's tokenizer as Tunix asks for one; any of transformers or SentencePiece would do."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer(demo.path())

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""
        return self._tokenizer.decode(ids)

    def bos_id(self) -> None:
        """There is none."""

    def eos_id(self) -> int:
        """What ends an answer."""
        return 1023

    def pad_id(self) -> int:
        """What stands where nothing does; no answer has it."""
        return 1021


def policy(mesh: jax.sharding.Mesh) -> nnx.Module:
    """The demo model as Tunix holds it."""
    config = qwen2.ModelConfig(
        num_layers=4, vocab_size=1024, embed_dim=192, hidden_dim=512, num_heads=6, head_dim=32, num_kv_heads=2,
        rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=True,
    )  # fmt: skip
    return create_model_from_safe_tensors(str(demo.path()), config, mesh, dtype=jnp.float32)


def train(steps: int, rate: float, engine: str, run: int = 0) -> tuple[list[float], float]:
    """Run ``steps`` steps of GRPO, and print what each gave.

    ``engine``: "rootcellar", or "vanilla", Tunix's own sampler. ``run``: another number, other draws. Returns the mean
    rewards, and the tokens that each second of rolling out gave after the first step, in which things compile.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": each}] for each in QUESTIONS]
    prompts = [Tokenizer(demo.path()).apply_chat_template(chat) for chat in chats]
    engine_options = {"max_total_tokens": 8192, "max_running_requests": len(prompts) * GROUP, "page_size": 16}
    ours = functools.partial(RootcellarRollout, model_path="demo", **engine_options)
    cluster = RLCluster(
        actor=policy(mesh),
        tokenizer=Words(),
        cluster_config=ClusterConfig(
            role_to_mesh={Role.ACTOR: mesh, Role.ROLLOUT: mesh},
            rollout_engine=ours if engine == "rootcellar" else engine,
            training_config=RLTrainingConfig(
                actor_optimizer=optax.adam(rate),
                eval_every_n_steps=steps + 1,
                max_steps=steps,
                mini_batch_size=len(prompts),
                train_micro_batch_size=len(prompts),
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=LONGEST,
                max_prompt_length=64,
                temperature=1.0,
                return_logprobs=True,
                kv_cache_size=256,
            ),
        ),
    )
    rollout = cluster.rollout
    curve: list[float] = []
    speeds: list[float] = []
    generate = rollout.generate

    def timed(prompts: Any, config: RolloutConfig, **named: Any) -> Any:
        began = time.perf_counter()
        # Without a seed Tunix's sampler draws the same numbers in every step, and there is little to learn from.
        output = generate(prompts, dataclasses.replace(config, seed=1000 * run + len(speeds)), **named)
        speeds.append(sum(map(len, output.tokens)) / (time.perf_counter() - began))
        return output

    rollout.generate = timed

    def reward(completions: list[str], **_: object) -> list[float]:
        """Answers of 40 characters are best. Called between rollout and training: what is printed is true of both."""
        rewards = [-abs(len(text) - 40) / 40 for text in completions]
        curve.append(float(np.mean(rewards)))
        told = ""
        if isinstance(rollout, RootcellarRollout):
            stats, status = rollout.engine.stats(), rollout.engine.status()
            told = (
                f", weights {status['weight_version']}, released {status['released']}, cached "
                f"{stats['cached_tokens']} of {stats['prompt_tokens']} prompt tokens, "
                f"{stats['compilations']} compilations"
            )
        print(f"step {len(curve):2d}: reward {curve[-1]:+.4f}{told}", flush=True)
        return rewards

    learner = GRPOLearner(
        rl_cluster=cluster,
        reward_fns=reward,
        algo_config=GRPOConfig(num_generations=GROUP, num_iterations=1, beta=0.0),
    )
    ours_alone = isinstance(rollout, RootcellarRollout)
    if ours_alone:
        print(f"largest difference of logprobs before the first step: {difference(cluster, prompts):.2e}")
    learner.train([{"prompts": np.array(prompts)}] * steps)
    tenth = max(1, steps // 10)
    print(f"reward of the first steps {np.mean(curve[:tenth]):+.4f}, of the last {np.mean(curve[-tenth:]):+.4f}")
    if ours_alone:
        print(f"largest difference of logprobs after the last step: {difference(cluster, prompts):.2e}")
    return curve, float(np.median(speeds[-steps + 1 :]))


def compare(steps: int, rate: float, runs: int) -> None:
    """The same training with each, from the same weights, so many ``runs``, and a line that compares them.

    Noise is the standard error of the difference of both means over the runs; of one, what its last rewards vary by.
    """
    last = max(1, steps // 5)
    ends: dict[str, list[float]] = {"vanilla": [], "rootcellar": []}
    speeds: dict[str, list[float]] = {"vanilla": [], "rootcellar": []}
    noise = 0.0
    for run in range(runs):
        for engine in ("vanilla", "rootcellar"):
            curve, speed = train(steps, rate, engine, run)
            print(f"{engine}, run {run}: {' '.join(f'{reward:+.2f}' for reward in curve)}", flush=True)
            ends[engine].append(float(np.mean(curve[-last:])))
            speeds[engine].append(speed)
            noise += float(np.std(curve[-last:]))
    theirs, ours = ends.values()
    slow, fast = (float(np.median(each)) for each in speeds.values())
    if runs > 1:
        noise = float(np.sqrt((np.var(theirs, ddof=1) + np.var(ours, ddof=1)) / runs))
    print(
        f"reward of the last {last} steps: Tunix's sampler {np.mean(theirs):+.4f}, the engine {np.mean(ours):+.4f}, "
        f"noise {noise:.4f}; tokens/s {slow:.0f} and {fast:.0f}: {fast / slow:.2f} times"
    )


def difference(cluster: RLCluster, prompts: list[str]) -> float:
    """The largest difference between the logprobs of a rollout, and those of Tunix's forward with the same weights."""
    output = cluster.generate(prompts * GROUP)
    pad, eos = cluster.rollout.pad_id(), cluster.rollout.eos_id()
    answers = np.full((len(output.tokens), LONGEST), pad, np.int32)
    said = np.zeros(answers.shape, np.float32)
    for row, (tokens, logprobs) in enumerate(zip(output.tokens, output.logprobs, strict=True)):
        answers[row, : len(tokens)], said[row, : len(tokens)] = tokens, logprobs
    graph, state = nnx.split(cluster.actor_trainer.model)
    theirs = compute_per_token_logps(graph, state, output.left_padded_prompt_tokens, answers, pad, eos)
    again = cluster.rollout.get_per_token_logps(output.left_padded_prompt_tokens, answers)
    written = answers != pad
    print(f"of {written.sum()} tokens; scored again by the engine: {np.abs(said - again)[written].max():.2e}")
    return float(np.abs(said - np.asarray(theirs))[written].max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--rollout", choices=("rootcellar", "vanilla", "both"), default="rootcellar")
    parser.add_argument("--runs", type=int, default=1, help="with both: trainings with each, of other draws")
    arguments = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    if arguments.rollout == "both":
        compare(arguments.steps, arguments.learning_rate, arguments.runs)
    else:
        train(arguments.steps, arguments.learning_rate, arguments.rollout)
