"""The parameters, each declared once: shape, logical axes, initializer, and what it is packed from.

A params pytree is plain::

    {"embed": [V, E], "norm": [E], "head": [E, V] (absent when tied),
     "layers": [{"attn_norm": [E], "qkv": [E, K, G + 2, D], "o": [H, D, E],
                 "mlp_norm": [E], "gate_up": [E, 2, I], "down": [I, E],
                 and where the model has them: "qkv_bias", "o_bias", "gate_up_bias", "down_bias", "q_norm", "k_norm"}]}

with V vocabulary, E hidden, H query heads, K key/value heads, G = H / K, D head dimension, I intermediate. Inputs come
first: ``x @ w`` reads such weights at memory speed for one token and beats ``x @ w.T`` by a third for sixteen (XLA on
CPU). q, k and v are one matrix, gate and up another: fewer, longer products were 1.1 to 1.2 times faster. The axes that
tensor parallelism will split stay whole axes: key/value head ``k`` owns the row ``[its G query heads, its key, its
value]``, and ``I`` is split under gate and up alike.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rootcellar.errors import ModelError
from rootcellar.models.config import ModelConfig
from rootcellar.models.families import FAMILIES

Params = dict[str, Any]
Axis = Literal["embed", "heads", "kv_heads", "mlp", "vocab"] | None


@dataclass(frozen=True)
class ParamSpec:
    """One parameter. ``axes`` names what may be sharded; ``sources`` are the checkpoint's tensors it is packed from."""

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    init: Literal["random", "ones", "zeros"]
    packing: Literal["same", "transposed", "qkv", "qkv_bias", "o", "gate_up", "gate_up_bias"]
    sources: tuple[str, ...]


def declare(cfg: ModelConfig) -> Params:
    """The params pytree of ``cfg`` with a ``ParamSpec`` at every leaf: the one declaration all else follows from."""
    names = FAMILIES[cfg.architecture].names

    def spec(name: str, shape: tuple[int, ...], axes: tuple[Axis, ...], init: Any, packing: Any = "same") -> ParamSpec:
        return ParamSpec(shape, axes, init, packing, names[name])

    vocab, embed = cfg.vocab_size, cfg.hidden_size
    top: Params = {
        "embed": spec("embed", (vocab, embed), ("vocab", "embed"), "random"),
        "norm": spec("norm", (embed,), (None,), "ones"),
    }
    if not cfg.tie_word_embeddings:
        top["head"] = spec("head", (embed, vocab), ("embed", "vocab"), "random", "transposed")
    heads, kv, group, dim, mlp = cfg.num_heads, cfg.num_kv_heads, cfg.group_size, cfg.head_dim, cfg.intermediate_size
    layer: Params = {
        "attn_norm": spec("attn_norm", (embed,), (None,), "ones"),
        "qkv": spec("qkv", (embed, kv, group + 2, dim), ("embed", "kv_heads", None, None), "random", "qkv"),
        "o": spec("o", (heads, dim, embed), ("heads", None, "embed"), "random", "o"),
        "mlp_norm": spec("mlp_norm", (embed,), (None,), "ones"),
        "gate_up": spec("gate_up", (embed, 2, mlp), ("embed", None, "mlp"), "random", "gate_up"),
        "down": spec("down", (mlp, embed), ("mlp", "embed"), "random", "transposed"),
    }
    if cfg.qkv_bias:
        layer["qkv_bias"] = spec("qkv_bias", (kv, group + 2, dim), ("kv_heads", None, None), "zeros", "qkv_bias")
    if cfg.o_bias:
        layer["o_bias"] = spec("o_bias", (embed,), (None,), "zeros")
    if cfg.mlp_bias:
        layer["gate_up_bias"] = spec("gate_up_bias", (2, mlp), (None, "mlp"), "zeros", "gate_up_bias")
        layer["down_bias"] = spec("down_bias", (embed,), (None,), "zeros")
    if cfg.qk_norm:
        layer["q_norm"] = spec("q_norm", (dim,), (None,), "ones")
        layer["k_norm"] = spec("k_norm", (dim,), (None,), "ones")
    return {**top, "layers": [_of_layer(layer, index) for index in range(cfg.num_layers)]}


def _of_layer(layer: Params, index: int) -> Params:
    return {
        name: ParamSpec(s.shape, s.axes, s.init, s.packing, tuple(x.format(layer=index) for x in s.sources))
        for name, s in layer.items()
    }


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as people write it: ``layers.3.qkv``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def count_bytes(cfg: ModelConfig, dtype: Any) -> int:
    """Bytes of the whole pytree in ``dtype``, without allocating it."""
    leaves: list[ParamSpec] = jax.tree.leaves(declare(cfg))
    itemsize: int = jnp.dtype(dtype).itemsize
    return itemsize * sum(prod(spec.shape) for spec in leaves)


def abstract_params(cfg: ModelConfig, dtype: Any) -> Params:
    """The pytree as ``jax.ShapeDtypeStruct``, for compiling and sharding without weights."""
    params: Params = jax.eval_shape(lambda: jax.tree.map(lambda spec: jnp.zeros(spec.shape, dtype), declare(cfg)))
    return params


def init_params(cfg: ModelConfig, seed: int, dtype: Any, std: float = 0.02) -> Params:
    """Random weights in ``dtype`` (``load_format="dummy"``, or the start of training): mean 0, deviation ``std``.

    Norms are one and biases zero. A value depends on ``seed``, its parameter's path and its place, on no backend.
    Uniform rather than normal numbers, drawn by numpy: ten times faster on CPU, and nothing to compile.
    """

    def create(path: tuple[Any, ...], spec: ParamSpec) -> Any:
        if spec.init != "random":
            return jax.device_put(np.full(spec.shape, {"ones": 1, "zeros": 0}[spec.init], dtype))
        random = np.random.default_rng([seed, zlib.crc32(path_name(path).encode())])
        values = random.random(spec.shape, np.float32)
        values -= np.float32(0.5)
        values *= np.float32(std * 12**0.5)
        return jax.device_put(values.astype(dtype, copy=False))

    params: Params = jax.tree_util.tree_map_with_path(create, declare(cfg))
    return params


def check_params(cfg: ModelConfig, params: Params) -> None:
    """Raise ``ModelError`` naming every parameter that is missing, unknown, misshapen or no float array."""
    wanted = {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(declare(cfg))}
    found = {path_name(p): a for p, a in jax.tree_util.tree_leaves_with_path(params)}
    wrong = [f"missing {name} {list(wanted[name].shape)}" for name in wanted if name not in found]
    wrong += [f"unknown {name}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        array, shape = found[name], wanted[name].shape
        if tuple(jnp.shape(array)) != shape:
            wrong.append(f"{name} has shape {list(jnp.shape(array))}, not {list(shape)}")
        elif not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            wrong.append(f"{name} is {jnp.result_type(array)}, not a float dtype")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ModelError(f"params do not fit {cfg.architecture}: {'; '.join(sorted(wrong)[:8])}{more}")
