"""The decoder against what transformers answered (tests/golden, scripts/make_golden.py)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import FAMILIES, Golden, golden, golden_names, make_config
from rootcellar.models.config import load_config, read_config
from rootcellar.models.decoder import forward, logits
from rootcellar.models.dense import make_mix_dense
from rootcellar.models.loader import load_params

# By day an engine answers these (tests/engine), and another of each family is scored here.
AT_NIGHT = (
    "bamba",
    "deepseek3",
    "gemma3",
    "gemma3-seeing",
    "llama2-dynamic",
    "llama3-d128",
    "qwen2-4kv",
    "qwen2-5-vl",
    "qwen3-5",
    "qwen3-tied-1kv-d128",
)


@partial(jax.jit, static_argnums=(1,))
def score(params, cfg, tokens):
    """Log-probabilities [B, T, V] after every token of padded rows [B, T]; padding on the right changes nothing."""
    batch, length = tokens.shape
    hidden = forward(params, cfg, tokens.reshape(-1), make_mix_dense(cfg, [length] * batch))
    return jax.nn.log_softmax(logits(params, cfg, hidden)).reshape(batch, length, -1)


def load(case: Golden, folder):
    case.make(folder)
    cfg = load_config(folder)
    return load_params(folder, cfg, jnp.float32), cfg


def test_the_golden_files_cover_what_they_should():
    cases = [golden(name) for name in golden_names()]
    assert {c.family for c in cases} == set(FAMILIES)
    assert all(len(c.prompts) == 16 and all(len(t) == 64 for t in c.tokens) for c in cases)
    assert all(len({t for row in c.tokens for t in row}) > 50 for c in cases)  # the text wanders


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in AT_NIGHT else []) for name in golden_names()]
)
def test_greedy_tokens_and_prompt_logprobs_equal_transformers(name, tmp_path):
    case = golden(name)
    params, cfg = load(case, tmp_path)
    rows = [p + t for p, t in zip(case.prompts, case.tokens, strict=True)]
    width = max(map(len, rows))
    scores = np.asarray(score(params, cfg, jnp.array([r + [0] * (width - len(r)) for r in rows], jnp.int32)))
    for row, prompt, tokens, expected in zip(scores, case.prompts, case.tokens, case.logprobs, strict=True):
        n = len(prompt)
        np.testing.assert_array_equal(row[n - 1 : n - 1 + len(tokens)].argmax(-1), tokens)
        got = row[np.arange(n - 1), prompt[1:]]
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_ragged_rows_score_like_each_row_alone(tmp_path):
    case = golden("qwen3")
    params, cfg = load(case, tmp_path)
    prompts = [p for p in case.prompts if len(p) in (1, 5)]
    lengths = [len(p) for p in prompts]
    tokens = jnp.concatenate([jnp.array(p, jnp.int32) for p in prompts])
    ragged = jax.jit(lambda params: logits(params, cfg, forward(params, cfg, tokens, make_mix_dense(cfg, lengths))))
    together = jax.nn.log_softmax(ragged(params))
    ends = np.cumsum([0, *lengths])
    for prompt, start, end in zip(prompts, ends, ends[1:], strict=False):
        alone = score(params, cfg, jnp.array([prompt], jnp.int32))[0]
        np.testing.assert_allclose(together[start:end], alone, atol=5e-5)


def test_bfloat16_stays_near_float32(tmp_path):
    case = golden("llama2")
    params, cfg = load(case, tmp_path)
    narrow = load_params(tmp_path, cfg, jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
    tokens = jnp.array([case.prompts[-1]], jnp.int32)
    wide, got = score(params, cfg, tokens), score(narrow, cfg, tokens)
    assert got.dtype == jnp.float32
    assert float(jnp.mean(jnp.abs(got - wide))) < 0.15
    assert float(jnp.mean(got.argmax(-1) == wide.argmax(-1))) > 0.9


def test_lengths_that_do_not_fit_the_tokens_are_refused():
    cfg = read_config(make_config("llama2"))
    with pytest.raises(ValueError, match="sum to 4, but there are 5 tokens"):
        make_mix_dense(cfg, [1, 3])(0, {}, jnp.zeros((5, cfg.hidden_size)))
