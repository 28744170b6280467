"""A small reinforcement-learning loop on one device: roll out, drop the KV cache, train, rebuild, roll out again.

    make test                              # once: sets up .venv, optax included
    .venv/bin/python examples/rl_rollout.py

The policy is the embedded demo model, the reward prefers short answers, and the update is REINFORCE with the mean
reward of the group as a baseline (the idea of GRPO, without its clipping). What matters here is memory: the engine and
the optimiser take turns on the same device. The engine reads the trainer's own arrays, and nothing compiles again after
the first round. Within a round the cache works: all prompts begin with one system message and all answers to a question
share its prompt, so each page of them is computed once; with new weights nothing of it is ever a hit again.
"""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rootcellar
from rootcellar import demo
from rootcellar.models.config import ModelConfig, load_config
from rootcellar.models.decoder import forward, logits
from rootcellar.models.dense import make_mix_dense
from rootcellar.models.loader import load_params

SYSTEM = "You are the manual of rootcellar, an LLM inference engine. Answer in one or two short sentences."
QUESTIONS = ["What is a KV cache?", "What does page_size do?"]
GROUP = 4  # answers to each question
LENGTH = 192  # tokens of a training row: prompt, answer, padding
ROUNDS = 3


def loss(params, cfg: ModelConfig, rows, answered, advantage):
    """Minus the advantage-weighted log-likelihood of the answers; rows int32 [B, LENGTH], answered bool [B, LENGTH]."""
    batch, length = rows.shape
    hidden = forward(params, cfg, rows.reshape(-1), make_mix_dense(cfg, [length] * batch))
    scores = jax.nn.log_softmax(logits(params, cfg, hidden).reshape(batch, length, -1)[:, :-1])
    chosen = jnp.take_along_axis(scores, rows[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(chosen * answered[:, 1:] * advantage[:, None]) / jnp.sum(answered)


def memory(phase: str, engine: rootcellar.Engine) -> None:
    """Print what lives on the device, and the compile counter."""
    gc.collect()
    live = sum(a.nbytes for a in jax.live_arrays()) / 1e6
    print(f"  {phase:34s} {live:7.1f} MB in arrays, {engine.stats()['compilations']:3d} compilations so far")


def main() -> None:
    """Run the loop."""
    cfg = load_config(demo.path())
    params = load_params(demo.path(), cfg, jnp.float32)
    optimiser = optax.adam(1e-4)
    state = optimiser.init(params)

    def step(params, state, rows, answered, advantage):
        value, gradient = jax.value_and_grad(loss)(params, cfg, rows, answered, advantage)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    train = jax.jit(step, donate_argnums=(0, 1))
    # What a round needs and no more: every shape that a step may have is compiled before the first.
    shapes = {"max_running_requests": len(QUESTIONS) * GROUP, "chunked_prefill_size": 64}
    with rootcellar.Engine(model_path="demo", params=params, max_total_tokens=16384, **shapes) as engine:
        engine.warm_up()
        system = {"role": "system", "content": SYSTEM}
        ids = [engine.chat_ids([system, {"role": "user", "content": q}]) for q in QUESTIONS]
        for number in range(ROUNDS):
            print(f"round {number}")
            answers = engine.generate(
                input_ids=ids, sampling_params={"temperature": 1.5, "max_new_tokens": 96, "n": GROUP, "seed": number}
            )
            memory("after the rollout", engine)
            rows, answered = np.zeros((len(answers), LENGTH), np.int32), np.zeros((len(answers), LENGTH), bool)
            for i, answer in enumerate(answers):
                prompt = ids[i // GROUP]
                row = (prompt + answer["output_ids"])[:LENGTH]
                rows[i, : len(row)] = row
                answered[i, len(prompt) : len(row)] = True
            reward = -np.array([len(a["output_ids"]) for a in answers], np.float32)
            groups = reward.reshape(-1, GROUP)
            advantage = ((groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1)).reshape(-1)

            freed = engine.release_memory_occupation()  # the KV cache; and the engine lets go of the trainer's weights
            memory(f"dropped {freed['bytes'] / 1e6:.1f} MB of KV cache", engine)
            params, state, value = train(params, state, rows, answered, advantage)
            memory("after the optimiser's step", engine)
            version = engine.update_weights(params)["weight_version"]
            engine.resume_memory_occupation()
            memory(f"rebuilt, weights of version {version}", engine)
            cached = [a["meta_info"]["cached_tokens"] for a in answers]
            asked = sum(a["meta_info"]["prompt_tokens"] for a in answers)
            print(
                f"  {sum(cached)} of {asked} prompt tokens were hits, {cached[0]} of them in the round's first answer"
            )
            print(f"  mean length {-reward.mean():.1f}, loss {float(value):+.4f}")


if __name__ == "__main__":
    main()
