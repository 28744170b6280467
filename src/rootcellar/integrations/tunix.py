"""Tunix's rollout worker, answered by an engine: token ids in, token ids and their logprobs out.

    from functools import partial
    from rootcellar.integrations.tunix import RootcellarRollout

    ClusterConfig(rollout_engine=partial(RootcellarRollout, model_path="path/of/the/checkpoint"), ...)

The engine computes with arrays of its own, made on the device of the trainer's at each push. Between two calls of
``generate`` its KV cache is given up, and the optimiser has the memory. The radix cache stays on: the answers of a
group share their prompt, all prompts what they begin with, and nothing of it outlives the weights that computed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from tunix.generate.tokenizer_adapter import TokenizerAdapter
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput

import rootcellar
from rootcellar.engine.build import folder_of
from rootcellar.integrations.tunix_trees import tensors_of
from rootcellar.models.config import load_config
from rootcellar.models.repacking import params_of_tensors


class RootcellarRollout(BaseRollout):
    """A ``BaseRollout`` over an engine of this process, ``engine``, which whoever made this may look at and ask."""

    def __init__(
        self,
        *,
        rollout_actor: nnx.Module,
        tokenizer: Any,
        rollout_config: RolloutConfig,
        model_path: str,
        mesh: Any = None,  # noqa: ARG002 - the cluster gives its own
        free_cache_engine: bool = True,
        **options: Any,
    ) -> None:
        """Start an engine with the actor's weights. All but the last three arguments are given by the cluster.

        Args:
            rollout_actor: the model to roll out; only its weights are read.
            tokenizer: what texts are read and written with.
            rollout_config: that of training; each call brings its own.
            model_path: a folder with the model's ``config.json``. Weights in it are not read.
            mesh: of the rollouts; the engine makes its own, of ``rollout_config.tensor_parallel_size`` devices.
            free_cache_engine: give up the KV cache between two calls of ``generate`` (verl's name).
            **options: settings of the engine (docs/configuration.md).
        """
        if jax.tree.leaves(nnx.state(rollout_actor, nnx.LoRAParam)):
            raise ValueError("adapters (LoRA) are not supported: merge them into the weights that are pushed")
        self._tokenizer = tokenizer if isinstance(tokenizer, TokenizerAdapter) else TokenizerAdapter(tokenizer)
        self._free_cache = free_cache_engine
        tree = nnx.to_pure_dict(nnx.state(rollout_actor, nnx.Param))
        size = max(1, rollout_config.tensor_parallel_size)
        cfg = load_config(folder_of(model_path), weights=False)
        dtype = jnp.dtype(rollout_config.data_type or jax.tree.leaves(tree)[0].dtype)
        self.engine = rootcellar.Engine(
            model_path=model_path,
            params=jax.jit(lambda tree: params_of_tensors(cfg, tensors_of(tree), dtype))(tree),
            **{"tp_size": size, "skip_tokenizer_init": True, "logprobs_mode": "processed_logprobs", **options},
        )

    def generate(
        self, prompts: Sequence[str | Sequence[int]], rollout_config: RolloutConfig, **_: Any
    ) -> RolloutOutput:
        """Continue each of ``prompts``, one answer each: texts, for Tunix's tokenizer, or token ids.

        ``tokens`` end with the token that ended the answer, so that the policy learns to end; ``text`` lacks it.
        ``logprobs`` (with ``return_logprobs``) are those of the distribution that tokens were drawn from. There are no
        ``logits``.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        ends = rollout_config.eos_tokens or [self.eos_id()]
        common = {
            "max_new_tokens": rollout_config.max_tokens_to_generate,
            "temperature": rollout_config.temperature,
            "top_p": 1.0 if rollout_config.top_p is None else rollout_config.top_p,
            "top_k": -1 if rollout_config.top_k is None else rollout_config.top_k,
            "stop_token_ids": [int(end) for end in ends],
            "ignore_eos": True,  # the model's own: these stand in their place
        }
        with self._cache(preserve=False):
            results = self.engine.generate(
                input_ids=ids,
                sampling_params=[{**common, "seed": seed} for seed in _seeds(rollout_config.seed, len(ids))],
                return_logprob=rollout_config.return_logprobs,
                return_text_in_logprobs=False,
            )
        answers = [each["output_ids"] for each in results]
        texts = [answer[:-1] if answer and answer[-1] in ends else answer for answer in answers]
        logprobs = None
        if rollout_config.return_logprobs:
            logprobs = [
                np.array([value for value, *_ in each["meta_info"]["output_token_logprobs"]], np.float32)
                for each in results
            ]
        return RolloutOutput(
            text=[self._tokenizer.decode(each) for each in texts],
            logits=[],
            tokens=[np.array(answer, np.int32) for answer in answers],
            left_padded_prompt_tokens=self._left_padded(ids, rollout_config.max_prompt_length),
            logprobs=logprobs,
        )

    def get_per_token_logps(self, prompt_tokens: Any, completion_tokens: Any) -> jax.Array:
        """The rollout policy's logprobs at temperature 1, float32 ``[B, C]``, 0 where a completion is padding.

        Args:
            prompt_tokens: ``[B, P]``, padded on the left; what is cached of them is not computed again.
            completion_tokens: ``[B, C]``, padded on the right.
        """
        prompts = [_stripped(row, self.pad_id(), left=True) for row in np.asarray(prompt_tokens)]
        answers = [_stripped(row, self.pad_id(), left=False) for row in np.asarray(completion_tokens)]
        scores = np.zeros(np.shape(completion_tokens), np.float32)
        lengths = [len(prompt) if len(answer) else -1 for prompt, answer in zip(prompts, answers, strict=True)]
        with self._cache(preserve=True):
            for start in sorted({*lengths} - {-1}):
                rows = [row for row, length in enumerate(lengths) if length == start]
                results = self.engine.generate(
                    input_ids=[np.concatenate([prompts[row], answers[row]]) for row in rows],
                    sampling_params={"max_new_tokens": 0},
                    return_logprob=True,
                    logprob_start_len=start,
                    return_text_in_logprobs=False,
                )
                for row, result in zip(rows, results, strict=True):
                    found = result["meta_info"]["input_token_logprobs"]
                    scores[row, : len(answers[row])] = [value for value, *_ in found]
        return jnp.asarray(scores)

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Compute with ``params`` from now on: all of the model's ``nnx.Param``, as a state or a dict of arrays."""
        if filter_types is not None and nnx.LoRAParam in filter_types:
            raise ValueError("adapters (LoRA) are not supported: merge them into the weights that are pushed")
        tree = params if isinstance(params, Mapping) and not isinstance(params, nnx.State) else nnx.to_pure_dict(params)
        self.engine.update_weights(tree, tensors_of=tensors_of)

    def pad_id(self) -> int:
        """The tokenizer's."""
        return int(self._tokenizer.pad_id())

    def eos_id(self) -> int:
        """The tokenizer's."""
        return int(self._tokenizer.eos_id())

    def model(self) -> None:
        """None: the engine has no module. Tunix pushes weights unless this is a module with the trainer's own arrays,
        which it then takes for shared; the engine, which has copies, would never see an update. (So
        ``offload_to_cpu`` cannot be on, as with Tunix's own groups of engines.)
        """

    @contextlib.contextmanager
    def _cache(self, *, preserve: bool) -> Iterator[None]:
        """The memory of the KV cache is there meanwhile; afterwards, whatever happened, it is the trainer's."""
        self.engine.resume_memory_occupation("kv_cache")
        try:
            yield
        finally:
            if self._free_cache:
                self.engine.release_memory_occupation("kv_cache", preserve=preserve)

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        first = self._tokenizer.bos_id()
        ids = [*([first] if first else []), *self._tokenizer.encode(prompt)]
        return [int(token) for token in self._tokenizer.dedup_bos_ids(ids)]  # as Tunix's own samplers

    def _left_padded(self, ids: Sequence[Sequence[int]], width: int) -> NDArray[np.int32]:
        width = max([width, *(len(row) for row in ids)])
        padded = np.full((len(ids), width), self.pad_id(), np.int32)
        for row, prompt in zip(padded, ids, strict=True):
            row[width - len(prompt) :] = prompt
        return padded


def _seeds(seed: Any, count: int) -> list[int | None]:
    """A seed for each prompt, none twice: of ``seed``, an integer or a key of JAX; None: the engine draws them."""
    if seed is None:
        return [None] * count
    words = (
        [int(seed)] if isinstance(seed, int | np.integer) else np.asarray(jax.random.key_data(seed)).ravel().tolist()
    )
    return [int(word) >> 1 for word in np.random.SeedSequence(words).generate_state(count, np.uint64)]


def _stripped(row: NDArray[np.integer], pad: int, *, left: bool) -> NDArray[np.integer]:
    """``row`` without the padding on its one side."""
    (places,) = np.nonzero(row != pad)
    if not len(places):
        return row[:0]
    return row[places[0] :] if left else row[: places[-1] + 1]
