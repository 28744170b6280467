"""Weights of other trees made ours on the device: no copy through the host, and one program for each form of tree.

Trainers hold a model's weights under names of their own, unfused: q, k and v, gate and up, each an array. Whoever hands
such a tree over says how its arrays are called in the family's checkpoints (``TensorsOf``), which is all that has to be
known of it. What of ours is one of its arrays as it is stays that array. All else is made by one compiled program,
which writes over what it made the time before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding

from rootcellar.errors import ModelError
from rootcellar.models.model import ModelConfig
from rootcellar.models.packing import SourceTensor, sources_of
from rootcellar.models.params import declare
from rootcellar.models.places import WeightPlace, sharding_of
from rootcellar.models.spec import Params, ParamSpec

TensorsOf = Callable[[Any], Mapping[str, Array]]
"""From a tree to a checkpoint's tensors by the names of its family. It is traced: shapes are known, values are not."""

Shaped = Array | jax.ShapeDtypeStruct
_SILENT = ("lm_head.weight", "rotary_emb.inv_freq")  # a tied head, stored frequencies: they say nothing new


def params_of_tensors(cfg: ModelConfig, tensors: Mapping[str, Array], dtype: Any) -> Params:
    """The params pytree of ``cfg`` from a checkpoint's tensors, as JAX computes it; may be traced.

    Raises ``ModelError`` naming tensors that are missing, unknown, misshapen or no floats.
    """
    specs = declare(cfg)
    check_tensors(_wanted(jax.tree.leaves(specs)), tensors)

    def part(source: SourceTensor) -> Array:
        tensor = tensors[source.name]
        return tensor if source.rows is None else tensor[source.rows]

    params: Params = jax.tree.map(lambda spec: _packed(spec, [part(each) for each in sources_of(spec)], dtype), specs)
    return params


def wanted_tensors(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a checkpoint of ``cfg`` has, by the names of its family."""
    return _wanted(jax.tree.leaves(declare(cfg)))


def check_tensors(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Shaped], *, some: bool = False) -> None:
    """Raise ``ModelError`` naming tensors that are missing, unknown, misshapen or no floats.

    ``wanted``: see :func:`wanted_tensors`; ``tensors``: arrays, or their shapes and dtypes; ``some``: none is missed.
    """
    wrong = [f"missing {name} {list(shape)}" for name, shape in wanted.items() if name not in tensors and not some]
    wrong += [f"unknown {name}" for name in tensors if name not in wanted and not name.endswith(_SILENT)]
    for name in wanted.keys() & tensors.keys():
        shape, dtype = tensors[name].shape, tensors[name].dtype
        if shape != wanted[name]:
            wrong.append(f"{name} has shape {list(shape)}, not {list(wanted[name])}")
        elif not jnp.issubdtype(dtype, jnp.floating):
            wrong.append(f"{name} is {dtype}, not a float dtype")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ModelError(f"these tensors are not the model's: {'; '.join(sorted(wrong)[:8])}{more}")


def _wanted(specs: Sequence[ParamSpec]) -> dict[str, tuple[int, ...]]:
    return {source.name: source.shape for spec in specs for source in sources_of(spec)}


def _packed(spec: ParamSpec, sources: Sequence[Array], dtype: Any) -> Array:
    """One parameter: a packing takes tensors out of it and is linear, so its transpose puts them in."""
    wanted = spec.dtype(dtype)
    tensors = [jnp.asarray(source).astype(wanted) for source in sources]
    whole = jax.ShapeDtypeStruct(spec.shape, wanted)
    packing: Callable[[Any], Any] = spec.packing  # written for numpy, of whose functions it takes what JAX has too
    (param,) = jax.linear_transpose(lambda param: [v.reshape(shape) for v, shape in packing(param)], whole)(tensors)
    array: Array = param
    return array


class Repacked(NamedTuple):
    """What a repacking gave.

    Attributes:
        leaves: of the params pytree, in its order.
        made: the indices of those that were made; all others are arrays of the tree.
    """

    leaves: list[Array]
    made: tuple[int, ...]


@dataclass(frozen=True)
class _Program:
    """The program for one form of tree: it makes the leaves ``made``; ``taken`` says which of the tree's others are."""

    run: Callable[[list[Any], list[Array]], list[Array]]
    made: tuple[int, ...]
    taken: Mapping[int, int]


class Repacking:
    """Makes ours of trees of one kind, for a model that lies at ``places``, one for each leaf.

    ``finish``: what is done to the params of ``cfg`` before they are placed (as several devices have them);
    ``shapes`` and ``dtypes`` are those of the finished leaves.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        dtype: Any,
        tensors_of: TensorsOf,
        places: Sequence[WeightPlace],
        finish: Callable[[Params], Params] = lambda params: params,
    ) -> None:
        self._cfg = cfg
        self._dtype = dtype
        self._tensors_of = tensors_of
        self._places = places
        self._finish = finish
        self._programs: dict[Any, _Program] = {}

    def __call__(self, tree: Any, old: Sequence[Array] = ()) -> Repacked:
        """Ours, of ``tree``.

        Args:
            tree: a pytree of arrays, best where the model is computed; it stays the caller's.
            old: what the call before made; it is written over, and gone. None: new memory is taken.

        Raises:
            ModelError: the tree's tensors are not the model's; nothing was touched.
        """
        leaves, form = jax.tree.flatten(tree)
        leaves = [self._here(leaf) for leaf in leaves]
        key = form, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        if key not in self._programs:
            self._programs[key] = self._compiled(form, leaves)
        program = self._programs[key]
        made = iter(program.run(leaves, list(old)))
        count = len(program.made) + len(program.taken)
        return Repacked(
            [leaves[program.taken[i]] if i in program.taken else next(made) for i in range(count)], program.made
        )

    def _here(self, leaf: Any) -> Array:
        """``leaf`` on the devices that compute: a trainer may have others."""
        at = sharding_of(self._places[0])
        devices = at.device_set
        if isinstance(leaf, Array) and leaf.sharding.device_set == devices:
            return leaf
        return jax.device_put(leaf, at if len(devices) == 1 else _whole(at))

    def _leaves(self, tree: Any) -> list[Array]:
        params = params_of_tensors(self._cfg, self._tensors_of(tree), self._dtype)
        return jax.tree.leaves(self._finish(params))

    def _compiled(self, form: Any, leaves: Sequence[Array]) -> _Program:
        def all_of(leaves: Sequence[Array]) -> list[Array]:
            return self._leaves(jax.tree.unflatten(form, leaves))

        found = jax.make_jaxpr(all_of)(leaves)
        given = {variable: i for i, variable in enumerate(found.jaxpr.invars)}
        # Literals cannot be looked up, and are no arrays of the tree.
        outs = list(enumerate(found.jaxpr.outvars))
        taken = {i: given[out] for i, out in outs if isinstance(out, type(found.jaxpr.invars[0])) and out in given}
        made = tuple(i for i, _ in outs if i not in taken)
        shapes = [found.out_avals[i] for i in made]
        places = [self._places[i] for i in made]

        def make(leaves: list[Array], old: list[Array]) -> list[Array]:  # noqa: ARG001 - its memory is used
            return [array for i, array in enumerate(all_of(leaves)) if i not in taken]

        make_over = jax.jit(make, donate_argnums=1, keep_unused=True, out_shardings=places)
        empty = jax.jit(lambda: [jnp.zeros(s.shape, s.dtype) for s in shapes], out_shardings=places)

        def run(leaves: list[Any], old: list[Array]) -> list[Array]:
            fits = [(a.shape, a.dtype, a.sharding) for a in old] == [
                (s.shape, s.dtype, sharding_of(place)) for s, place in zip(shapes, places, strict=True)
            ]
            # New memory goes the same way, so that there is one program.
            result: list[Array] = make_over(leaves, old if fits else empty())
            return result

        return _Program(run, made, taken)


def _whole(sharding: Sharding) -> Sharding:
    assert isinstance(sharding, jax.sharding.NamedSharding)
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
