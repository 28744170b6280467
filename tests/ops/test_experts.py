"""Routing and grouped products against loops over tokens and experts, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootcellar.errors import ModelError
from rootcellar.ops.experts import Router, grouped, route


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def route_one(router, logits, correction):
    """The definition, for one token: {expert: weight}."""
    scores = softmax(logits) if router.scores == "softmax" else sigmoid(logits)
    merit = scores + correction if router.correction else scores
    size = router.experts // router.groups
    worth = [np.sort(merit[g * size : (g + 1) * size])[::-1] for g in range(router.groups)]
    worth = [w[:2].sum() if router.correction else w[0] for w in worth]
    groups = sorted(range(router.groups), key=lambda g: -worth[g])[: router.top_groups]
    allowed = [e for e in range(router.experts) if e // size in groups]
    chosen = sorted(allowed, key=lambda e: -merit[e])[: router.top_k]
    total = sum(scores[e] for e in chosen) if router.renormalise else 1
    return {e: scores[e] / total * router.scale for e in chosen}


ROUTERS = {
    "mixtral": Router(8, 2, renormalise=True),
    "one": Router(1, 1),
    "all": Router(4, 4),
    "deepseek-v2-lite": Router(16, 6, scale=1.5),
    "deepseek-v2": Router(16, 4, groups=4, top_groups=2, scale=16.0),
    "deepseek-v3": Router(
        16, 4, scores="sigmoid", renormalise=True, correction=True, groups=4, top_groups=2, scale=2.5
    ),
    "llama4": Router(8, 1, scores="sigmoid"),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_follows_the_definition(name):
    router = ROUTERS[name]
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((200, router.experts)).astype(np.float32) * 2
    correction = rng.standard_normal(router.experts).astype(np.float32) if router.correction else None
    chosen, weights = jax.jit(route, static_argnums=0)(router, logits, correction)
    assert chosen.dtype == jnp.int32
    assert weights.dtype == jnp.float32
    for row, ids, ws in zip(logits.astype(np.float64), np.asarray(chosen), np.asarray(weights), strict=True):
        expected = route_one(router, row, correction)
        assert set(ids.tolist()) == set(expected)
        np.testing.assert_allclose(ws, [expected[e] for e in ids.tolist()], rtol=1e-5)


def test_a_correction_changes_who_is_chosen_and_not_the_weights():
    router = Router(4, 1, scores="sigmoid", correction=True)
    chosen, weights = route(router, jnp.array([[2.0, 1.0, 0.0, -1.0]]), jnp.array([0.0, 0.0, 0.0, 9.0]))
    assert chosen.tolist() == [[3]]
    assert float(weights[0, 0]) == pytest.approx(sigmoid(-1.0))


def test_saturated_scores_keep_their_order():
    """A sigmoid of 20 and one of 30 are the same float; the larger score is still the better."""
    chosen, _ = route(Router(3, 1, scores="sigmoid"), jnp.array([[20.0, 30.0, 25.0]]))
    assert chosen.tolist() == [[1]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 9}, "top_k=9 .* there are 8"),
        ({"groups": 3}, "groups=3"),
        ({"groups": 4, "top_groups": 5}, "top_groups=5"),
        ({"top_k": 5, "groups": 4, "top_groups": 2}, "top_k=5 is more than"),
        ({"correction": True, "groups": 8, "top_groups": 4}, "8 groups of one"),
    ],
)
def test_routers_that_cannot_be_are_refused(fields, words):
    with pytest.raises(ModelError, match=words):
        Router(**{"experts": 8, "top_k": 2, **fields})


def middle(rows, expert):
    """Depends on the expert, so that rows given to another one show."""
    gate, up = jnp.split(rows, 2, axis=-1)
    return jax.nn.silu(gate) * up + expert[..., None, None]


def run(form, *arrays):
    return np.asarray(jax.jit(lambda x, ids, g, d: grouped(x, ids, g, middle, d, form))(*arrays))


def make_case(rng, tokens, experts, top_k, parts=1, embed=24, inner=16):
    """Skewed choices: some experts have many tokens, some none."""
    liking = rng.exponential(size=experts) ** 3
    chosen = np.stack([rng.choice(experts, top_k, replace=False, p=liking / liking.sum()) for _ in range(tokens)])
    x = rng.standard_normal((tokens, embed), np.float32)
    gate_up = rng.standard_normal((experts, parts, embed, 2 * inner // parts), np.float32)
    down = rng.standard_normal((experts, inner, embed), np.float32)
    return x, chosen.astype(np.int32), gate_up, down


def loop(x, chosen, gate_up, down):
    """Every token through each of its experts, one after another."""
    x, gate_up, down = (a.astype(np.float64) for a in (x, gate_up, down))
    out = np.empty((*chosen.shape, x.shape[1]))
    for t, ids in enumerate(chosen):
        for k, e in enumerate(ids):
            row = x[t] if len(x) == len(chosen) else x[t * len(ids) + k]
            of_parts = [np.split(row @ part, 2) for part in gate_up[e]]
            gate, up = (np.concatenate(each) for each in zip(*of_parts, strict=True))
            out[t, k] = (gate * sigmoid(gate) * up + e) @ down[e]
    return out


@pytest.mark.parametrize(
    ("form", "tokens", "experts", "top_k", "parts"),
    [
        (None, 7, 16, 4, 1),
        *(("blocks", *sizes) for sizes in ((1, 8, 2, 1), (1, 1, 1, 1), (16, 4, 4, 1), (100, 8, 2, 4), (129, 3, 1, 1))),
        *(("ragged", *sizes) for sizes in ((1, 8, 2, 1), (100, 8, 2, 1), (100, 8, 2, 4))),
    ],
)
def test_grouped_products_equal_a_loop(form, tokens, experts, top_k, parts):
    x, chosen, gate_up, down = make_case(np.random.default_rng(tokens), tokens, experts, top_k, parts)
    out = run(form, x, chosen, gate_up, down)
    np.testing.assert_allclose(out, loop(x, chosen, gate_up, down), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("form", ["blocks", "ragged"])
def test_rows_may_differ_by_expert(form):
    rng = np.random.default_rng(5)
    _, chosen, gate_up, down = make_case(rng, 9, 6, 3)
    x = rng.standard_normal((27, 24), np.float32)
    out = run(form, x, chosen, gate_up, down)
    np.testing.assert_allclose(out, loop(x, chosen, gate_up, down), rtol=2e-4, atol=2e-4)


def test_one_token_that_is_not_a_number_harms_no_other():
    x, chosen, gate_up, down = make_case(np.random.default_rng(6), 40, 8, 2)
    chosen[:, 0], chosen[:, 1] = 3, 5  # all share their blocks
    expected = loop(x, chosen, gate_up, down)
    x[0] = np.nan
    out = run("blocks", x, chosen, gate_up, down)
    assert np.isnan(out[0]).all()
    np.testing.assert_allclose(out[1:], expected[1:], rtol=2e-4, atol=2e-4)


def test_both_forms_have_the_same_gradients():
    x, chosen, gate_up, down = map(jnp.asarray, make_case(np.random.default_rng(8), 20, 4, 2))

    def loss(form):
        return jax.jit(jax.grad(lambda x, g, d: jnp.sum(grouped(x, chosen, g, middle, d, form) ** 2), (0, 1, 2)))

    for blocks, ragged in zip(loss("blocks")(x, gate_up, down), loss("ragged")(x, gate_up, down), strict=True):
        np.testing.assert_allclose(blocks, ragged, rtol=1e-3, atol=1e-2)
