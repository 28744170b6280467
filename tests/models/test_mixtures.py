"""Mixtures of experts as each architecture has them, from its checkpoint's tensors, against loops in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootcellar.errors import ModelError
from rootcellar.models import packing
from rootcellar.models.feed_forward import Clamp, Dense, Experts
from rootcellar.models.packing import pack, sources_of, unpack
from rootcellar.models.spec import ParamSpec
from rootcellar.ops.experts import Router

EMBED, INNER, COUNT, TOP = 24, 16, 8, 3
ROUTER = Router(COUNT, TOP, renormalise=True)
CASES = {
    "deepseek": Experts(dataclasses.replace(ROUTER, renormalise=False, scale=2.0), INNER, "apart", shared=Dense(40)),
    "deepseek-v3": Experts(
        Router(COUNT, TOP, "sigmoid", True, 2.5, correction=True, groups=4, top_groups=2), INNER, "apart"
    ),
    "qwen3-next": Experts(ROUTER, INNER, "apart", shared=Dense(20), shared_gate=True),
    "granite": Experts(ROUTER, INNER, "linear"),
    "llama4": Experts(Router(COUNT, TOP, "sigmoid"), INNER, "halves", weigh="inputs", shared=Dense(INNER)),
    "gpt-oss": Experts(ROUTER, INNER, "interleaved", bias=True, router_bias=True, clamp=Clamp(1.5, 1.702)),
}


def declare(name, shape, axes, init, packing=packing.same, inputs=()):
    """Parameters whose sources are called as they are."""
    many = name in ("experts_gate_up", "experts_down")
    ends = (".gate", ".up") if name.endswith("gate_up") else ("",)
    sources = tuple(f"{name}.{{expert}}{e}" if many else name + e for e in ends)
    return ParamSpec(shape, axes, init, packing, sources, inputs=inputs)


def specs_of(experts):
    """The specs; what stores all experts in one tensor has one source."""
    specs = experts.declare(declare, EMBED)
    if experts.stored != "apart":
        for name in ("experts_gate_up", "experts_down"):
            specs[name] = dataclasses.replace(specs[name], sources=(name,))
    return specs


def tensors_of(specs, seed=0):
    rng = np.random.default_rng(seed)
    return {
        each.name: rng.standard_normal(each.shape).astype(np.float32) * 0.5
        for spec in jax.tree.leaves(specs)
        for each in sources_of(spec)
    }


def params_of(specs, tensors):
    def load(spec):
        return pack(spec, [lambda rows, name=name: tensors[name][rows] for name in spec.sources], np.float32)

    return jax.tree.map(load, specs)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu_gated(x, gate, up, down):
    """A linear layer is [out, in]."""
    g = gate @ x
    return down @ (g * sigmoid(g) * (up @ x))


def weights_of(name, experts, scores, tensors):
    """{expert: weight} of one token, as the architecture's own implementation has it."""
    best = np.argsort(-scores)[:TOP]
    if name == "deepseek":
        soft = np.exp(scores) / np.exp(scores).sum()
        return {e: soft[e] * 2.0 for e in best}
    if name == "deepseek-v3":
        merit = sigmoid(scores) + tensors["correction"]
        worth = np.sort(merit.reshape(4, 2))[:, ::-1].sum(-1)
        merit = np.where(np.isin(np.arange(COUNT) // 2, np.argsort(-worth)[:2]), merit, -np.inf)
        best = np.argsort(-merit)[:TOP]
        return {e: 2.5 * sigmoid(scores[e]) / sigmoid(scores[best]).sum() for e in best}
    if name == "llama4":
        return {e: sigmoid(scores[e]) for e in best}
    soft = np.exp(scores[best]) / np.exp(scores[best]).sum()
    return dict(zip(best, soft, strict=True))


def expert_of(name, tensors, e, x):
    """One expert's answer for one token."""
    if name in ("deepseek", "deepseek-v3", "qwen3-next"):
        parts = [tensors[f"experts_gate_up.{e}.{part}"] for part in ("gate", "up")]
        return silu_gated(x, *parts, tensors[f"experts_down.{e}"])
    if name == "granite":
        gate, up = np.split(tensors["experts_gate_up"][e], 2)
        return silu_gated(x, gate, up, tensors["experts_down"][e])
    rows, down = x @ tensors["experts_gate_up"][e], tensors["experts_down"][e]
    if name == "llama4":
        gate, up = np.split(rows, 2)
        return (up * gate * sigmoid(gate)) @ down
    rows = rows + tensors["experts_gate_up_bias"][e]
    gate, up = np.minimum(rows[0::2], 1.5), np.clip(rows[1::2], -1.5, 1.5)
    return ((up + 1) * gate * sigmoid(1.702 * gate)) @ down + tensors["experts_down_bias"][e]


def mixture(name, experts, tensors, x):
    scores = tensors["router"] @ x + (tensors["router_bias"] if experts.router_bias else 0)
    out = np.zeros(EMBED)
    for e, weight in weights_of(name, experts, scores, tensors).items():
        out += expert_of(name, tensors, e, weight * x) if name == "llama4" else weight * expert_of(name, tensors, e, x)
    if experts.shared is not None:
        shared = silu_gated(x, *(tensors[f"shared_{part}"] for part in ("gate_up.gate", "gate_up.up", "down")))
        out += shared * (sigmoid(tensors["shared_gate"] @ x) if experts.shared_gate else 1)
    return out


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_mixture_is_what_the_architecture_says(name, devices):
    experts = CASES[name]
    specs = specs_of(experts)
    tensors = tensors_of(specs)
    params, served = experts.as_served(params_of(specs, tensors), devices), experts.served(devices)
    shapes, declared = jax.tree.map(jnp.shape, params), jax.tree.map(lambda spec: spec.shape, specs_of(served))
    assert shapes == declared
    assert declared["experts_gate_up"] == (COUNT, devices, EMBED, 2 * INNER // devices)
    x = np.random.default_rng(9).standard_normal((33, EMBED)).astype(np.float32)
    out = jax.jit(served.apply)(params, jnp.asarray(x))
    wide = {key: value.astype(np.float64) for key, value in tensors.items()}
    expected = np.stack([mixture(name, experts, wide, row.astype(np.float64)) for row in x])
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-5)


def test_each_device_has_the_gates_of_its_ups():
    """So the columns that its part of the matrix gives are those that its part of the other takes."""
    experts = CASES["qwen3-next"]
    specs = specs_of(experts)
    tensors = tensors_of(specs)
    parts = experts.as_served(params_of(specs, tensors), 4)["experts_gate_up"]
    for expert, of_expert in enumerate(parts):
        for device, part in enumerate(of_expert):
            columns = slice(device * INNER // 4, (device + 1) * INNER // 4)
            mine = [tensors[f"experts_gate_up.{expert}.{each}"][columns].T for each in ("gate", "up")]
            np.testing.assert_array_equal(part, np.concatenate(mine, axis=1))


def test_what_devices_do_not_divide_stays_one_part():
    experts = CASES["gpt-oss"]
    params = params_of(specs := specs_of(experts), tensors_of(specs))
    assert experts.served(3) == experts
    assert experts.as_served(params, 3)["experts_gate_up"] is params["experts_gate_up"]


def test_a_token_is_answered_alone_as_beside_others():
    experts = CASES["gpt-oss"]
    specs = specs_of(experts)
    params = params_of(specs, tensors_of(specs))
    x = jnp.asarray(np.random.default_rng(9).standard_normal((33, EMBED)), jnp.float32)
    apply = jax.jit(experts.apply)
    alone = jnp.concatenate([apply(params, row[None]) for row in x[:3]])
    np.testing.assert_allclose(alone, apply(params, x)[:3], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_tensors_come_back_as_they_went_in(name):
    specs = specs_of(CASES[name])
    tensors = tensors_of(specs)
    for spec, array in zip(jax.tree.leaves(specs), jax.tree.leaves(params_of(specs, tensors)), strict=True):
        for source, back in unpack(spec, array):
            np.testing.assert_array_equal(back, tensors[source])


def test_biases_of_experts_apart_are_refused():
    with pytest.raises(ModelError, match="'apart' with biases"):
        Experts(ROUTER, INNER, "apart", bias=True)
