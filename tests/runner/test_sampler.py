"""The sampler against what its parameters mean, written out with sorting in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootcellar.runner import sampler
from rootcellar.runner.sampler import Sampled
from rootcellar.sampling_params import SamplingParams

VOCAB = 40
NONE = np.zeros(0, np.int64)
sample = jax.jit(sampler.sample)


def row(position=0, seed=0, banned=(), prompt=NONE, output=NONE, **params):
    return Sampled(SamplingParams(**params), seed, position, banned, prompt, output)


def draw(logits, rows):
    tokens, logprobs = sample(jnp.asarray(logits), sampler.build(rows, logits.shape[0], logits.shape[1]))
    return np.asarray(tokens), np.asarray(logprobs)


def allowed(logits, top_k, top_p, min_p, temperature):
    """Token ids that may be drawn: top-k, then top-p of what is left, then min-p; ties at the threshold stay."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.sort(p)[::-1]
    if 0 < top_k < len(p):
        p = np.where(p >= order[top_k - 1], p, 0)
    p /= p.sum()
    order = np.sort(p)[::-1]
    keep = min(int(np.searchsorted(np.cumsum(order), top_p - 1e-6)), len(p) - 1)
    threshold = max(order[keep] if top_p < 1 else 0, min_p * p.max())
    return set(np.flatnonzero((p >= threshold * (1 - 1e-6)) & (p > 0)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([-1, 1, 2, 5, 39, 40, 100]),
    top_p=st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
)
def test_only_tokens_that_the_truncation_allows_are_drawn(seed, top_k, top_p, min_p, temperature):
    logits = np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 3
    params = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    rows = [row(position=i, seed=seed, **params) for i in range(64)]
    tokens, _ = draw(np.tile(logits, (64, 1)), rows)
    assert set(tokens.tolist()) <= allowed(logits.astype(np.float64), top_k, top_p, min_p, temperature)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_drawn_frequencies_follow_the_distribution(params):
    logits = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32) * 2
    full = {"top_k": -1, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, **params}
    kept = allowed(logits.astype(np.float64), **full)
    p = np.where(np.isin(np.arange(VOCAB), list(kept)), np.exp(logits / full["temperature"]), 0)
    p /= p.sum()
    n = 4096
    tokens, _ = draw(np.tile(logits, (n, 1)), [row(position=i, seed=9, **params) for i in range(n)])
    counts = np.bincount(tokens, minlength=VOCAB) / n
    assert np.abs(counts - p).max() < 4 * np.sqrt(0.25 / n)


def test_greedy_takes_the_likeliest_and_mixes_with_drawn_rows():
    logits = np.random.default_rng(2).standard_normal((3, VOCAB)).astype(np.float32)
    tokens, logprobs = draw(logits, [row(temperature=0), row(temperature=2.0, seed=3), row(top_k=1)])
    assert tokens[0] == logits[0].argmax()
    assert tokens[2] == logits[2].argmax()
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, expected[np.arange(3), tokens], atol=1e-5)
    assert sampler.build([row(temperature=0)] * 3, 4, VOCAB) is None  # plain greedy needs no settings at all


def test_choices_depend_on_seed_and_position_only():
    logits = np.tile(np.random.default_rng(3).standard_normal(VOCAB).astype(np.float32), (4, 1))
    rows = [row(seed=1, position=5), row(seed=1, position=6), row(seed=2, position=5), row(seed=1, position=5)]
    tokens, _ = draw(logits, rows)
    assert tokens[0] == tokens[3]
    many = [draw(logits[:1], [row(seed=s, position=p)])[0][0] for s in range(6) for p in range(6)]
    assert len(set(many)) > 5
    assert many[1 * 6 + 5] == tokens[0]  # alone as in a batch


def test_banned_tokens_are_never_chosen():
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, 3] = 50
    tokens, logprobs = draw(logits, [row(temperature=0, banned=(3,)), row(banned=tuple(range(3, 40)))])
    assert tokens[0] != 3
    assert tokens[1] < 3
    assert logprobs[0] == pytest.approx(-50, abs=1e-3)  # the model's own distribution: before the ban


def test_penalties_are_what_their_definitions_say():
    logits = np.random.default_rng(5).standard_normal((1, VOCAB)).astype(np.float32)
    prompt, output = np.array([1, 2]), np.array([2, 3, 3])
    params = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.5, "temperature": 0}
    settings = sampler.build([row(prompt=prompt, output=output, **params)], 1, VOCAB)
    got = np.asarray(sampler._adjust(jnp.asarray(logits), settings))[0]
    expected = logits[0].copy()
    for token in (1, 2, 3):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[2] -= 0.5 * 1 + 0.25
    expected[3] -= 0.5 * 2 + 0.25
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_bias_is_added_after_the_penalties_and_before_bans_and_the_choice():
    logits = np.random.default_rng(7).standard_normal((4, VOCAB)).astype(np.float32)
    best, second = np.argsort(-logits[0])[:2]
    gap = float(logits[0, best] - logits[0, second])
    rows = [
        row(temperature=0, logit_bias={int(second): gap + 0.01}),
        row(temperature=0, logit_bias={int(second): 100}, banned=(int(second),)),
        row(temperature=1.0, seed=1, logit_bias={"7": 100}),
        row(temperature=0),  # beside the others, untouched
    ]
    logits[1:] = logits[0]
    tokens, logprobs = draw(logits, rows)
    assert tokens.tolist() == [second, best, 7, best]
    expected = logits[0] - np.log(np.exp(logits[0]).sum())
    np.testing.assert_allclose(logprobs, expected[tokens], atol=1e-5)  # the model's own, without the bias
    penalised = row(temperature=0, output=np.array([best]), frequency_penalty=2.0, logit_bias={int(best): 2.0})
    np.testing.assert_allclose(
        np.asarray(sampler._adjust(jnp.asarray(logits[:1]), sampler.build([penalised], 1, VOCAB)))[0], logits[0],
        atol=1e-6,
    )  # fmt: skip


def test_a_bias_is_no_program_of_its_own():
    programs = [
        {name for name, value in vars(p).items() if value is not None} if p else None
        for p in sampler.every_program(2, VOCAB)
    ]
    for params in ({"logit_bias": {1: 1.0}}, {"presence_penalty": 1.0}, {"temperature": 0, "logit_bias": {1: 1, 2: 2}}):
        made = sampler.build([row(**params)], 2, VOCAB)
        assert {name for name, value in vars(made).items() if value is not None} in programs
        assert made.banned.shape == (2, 8)


def test_top_logprobs():
    logits = np.random.default_rng(6).standard_normal((3, VOCAB)).astype(np.float32)
    values, ids = sampler.top_logprobs(jnp.asarray(logits), 4)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logits, axis=-1)[:, :4]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(values, np.take_along_axis(expected, order, -1), atol=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 5},
        {"temperature": 0.6, "top_p": 0.7, "min_p": 0.02},
        {"temperature": 0, "logit_bias": {"4": 2.0}},
        {"temperature": 0.8, "logit_bias": {"4": 2.0}, "frequency_penalty": 0.5},
    ],
)
def test_processed_logprobs_are_those_of_what_tokens_are_drawn_from(params):
    logits = np.random.default_rng(8).standard_normal(VOCAB).astype(np.float32) * 2
    n = 64
    rows = [row(position=i, seed=2, banned=(7,), **params) for i in range(n)]
    settings = sampler.build(rows, n, VOCAB)
    many = jnp.asarray(np.tile(logits, (n, 1)))
    tokens, logprobs = jax.jit(sampler.sample, static_argnames="processed")(many, settings, processed=True)
    raw_tokens, raw = sample(many, settings)
    np.testing.assert_array_equal(tokens, raw_tokens)  # what is reported changes nothing of what is drawn
    expected = logits.astype(np.float64)
    expected[4] += 2.0 if "logit_bias" in params else 0.0
    expected[7] = -np.inf
    temperature = params["temperature"]
    if temperature:
        kept = allowed(expected, *(params.get(k, d) for k, d in (("top_k", -1), ("top_p", 1.0), ("min_p", 0.0))),
                       temperature)  # fmt: skip
        expected = np.where(np.isin(np.arange(VOCAB), list(kept)), expected / temperature, -np.inf)
    expected = expected - np.log(np.exp(expected).sum())
    np.testing.assert_allclose(logprobs, expected[np.asarray(tokens)], atol=1e-5)
    assert np.abs(np.asarray(raw) - logprobs).max() > 0.01
    values, ids = sampler.top_logprobs(many, 4, settings)
    np.testing.assert_array_equal(ids[0], np.argsort(-expected)[:4])
    np.testing.assert_allclose(values[0], expected[np.asarray(ids[0])], atol=1e-5)


SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**40 + 1, 2**63 - 1, -1, -(2**63)]


def test_every_bit_of_a_seed_counts():
    """What JAX draws for such a key where it takes 64 bits."""
    logits = np.random.default_rng(2).standard_normal((len(SEEDS), VOCAB)).astype(np.float32)
    tokens, _ = draw(logits, [row(seed=s, position=3) for s in SEEDS])
    for seed, values, token in zip(SEEDS, logits, tokens, strict=True):
        with jax.enable_x64(True):
            key = jax.random.fold_in(jax.random.key(seed), np.uint32(3))
            drawn = values + np.asarray(jax.random.gumbel(key, (VOCAB,), jnp.float32))
        assert int(token) == int(drawn.argmax()), seed
    streams = [tuple(draw(logits[:1], [row(seed=s, position=p)])[0][0] for p in range(24)) for s in SEEDS]
    assert len(set(map(str, streams))) == len(SEEDS)


def test_plain_greedy_takes_the_first_of_the_likeliest_and_a_row_that_is_no_number_harms_no_other():
    logits = np.random.default_rng(5).integers(-3, 4, (8, VOCAB)).astype(np.float32)  # many are equal
    logits[1] = -np.inf
    logits[2, 7] = logits[2, 9] = np.inf
    logits[3] = 0.0
    logits[3, ::2] = -0.0
    logits[4, 5] = np.nan
    tokens, logprobs = sample(jnp.asarray(logits), None)
    others = [0, 1, 2, 3, 5, 6, 7]
    np.testing.assert_array_equal(np.asarray(tokens)[others], logits[others].argmax(axis=-1))
    assert 0 <= int(tokens[4]) < VOCAB
    assert np.isnan(logprobs[4])


def test_a_top_p_of_zero_is_greedy_and_a_top_k_of_zero_leaves_all():
    logits = np.random.default_rng(3).standard_normal((2, VOCAB)).astype(np.float32)
    tokens, _ = draw(logits, [row(seed=5, top_p=0.0), row(seed=5, top_k=0)])
    same, _ = draw(logits, [row(seed=5, temperature=0), row(seed=5, top_k=-1)])
    assert tokens.tolist() == same.tolist()
    assert int(tokens[0]) == int(logits[0].argmax())


def test_a_top_k_of_more_than_there_are_tokens_leaves_all():
    assert sampler.build([row(top_k=2**40)], 1, VOCAB).top_k.tolist() == [VOCAB]
