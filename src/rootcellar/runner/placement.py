"""Where weights and pools lie: on one device, or split over the axis ``tensor`` of a mesh.

Tensor parallelism in the manner of Megatron-LM (Shoeybi et al., 2019): heads and the feed-forward's inner dimension are
split, so that each layer needs two sums over the devices. Attention itself stays on each device, with the KV heads
there. When there are fewer KV heads than devices, each is repeated, so that every device has one of its own; the query
heads that shared it are divided among the copies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from rootcellar.errors import ConfigError
from rootcellar.models.mixers import Attention
from rootcellar.models.model import ModelConfig
from rootcellar.models.params import declare
from rootcellar.models.places import WeightPlace, in_order, lies_at, sharding_of
from rootcellar.models.repacking import Repacking, TensorsOf
from rootcellar.models.spec import Params, ParamSpec
from rootcellar.ops import products
from rootcellar.ops.panels import HOLDINGS, Packed, Packer, packer
from rootcellar.plan.stored import Heads
from rootcellar.pools import Layout
from rootcellar.runner.large_pages import in_large_pages

AXIS = "tensor"
# Logical axes of parameters that are split over the devices.
_SPLIT = ("heads", "kv_heads", "mlp", "vocab")


def _devices(count: int) -> Sequence[jax.Device]:
    """So many devices, as many of each process, those of rank 0 first."""
    processes = jax.process_count()
    if processes == 1:
        return jax.devices()[:count]
    each = count // processes
    found = [[d for d in jax.devices() if d.process_index == rank][:each] for rank in range(processes)]
    for rank, devices in enumerate(found):
        if len(devices) < each:
            raise ConfigError(f"tp_size={count} takes {each} devices of each rank, and rank {rank} has {len(devices)}")
    return [device for devices in found for device in devices]


def _with_fixed_norms(model: ModelConfig) -> ModelConfig:
    """A model of attention whose norms sum in one order."""

    def fixed(mixer: Any) -> Any:
        if not isinstance(mixer, Attention) or mixer.qk_norm is None:
            return mixer
        return replace(mixer, qk_norm=replace(mixer.qk_norm, fixed=True))

    layers = tuple(replace(layer, mixer=fixed(layer.mixer)) for layer in model.layers)
    return replace(model, norm=replace(model.norm, fixed=True), layers=layers)


@dataclass(frozen=True)
class Placement:
    """How a model lies on ``tp_size`` devices, and how its weights are held."""

    model: ModelConfig
    tp_size: int = 1
    holding: str | None = None
    """How weights that products take are packed: a name in ``ops.panels.HOLDINGS``; None: they are arrays."""
    fixed: bool = False
    """Whether sums over packed weights are in one order, whatever rows there are."""
    devices: tuple[jax.Device, ...] | None = None
    """Those to choose from; None: this machine's. Programs compile for devices that only a topology describes, too."""

    def __post_init__(self) -> None:
        found = jax.device_count() if self.devices is None else len(self.devices)
        if self.tp_size > found:
            raise ConfigError(f"tp_size={self.tp_size}, and there are {found} devices: lower tp_size")

    @cached_property
    def mesh(self) -> Mesh | None:
        """The mesh with the axis ``tensor``; None for a single device."""
        return None if self.tp_size == 1 else Mesh(np.array(self._chosen), (AXIS,))

    @property
    def _chosen(self) -> Sequence[jax.Device]:
        return _devices(self.tp_size) if self.devices is None else self.devices[: self.tp_size]

    @cached_property
    def served(self) -> ModelConfig:
        """The model as it is computed: its layers as so many devices have them, its sums in one order where ``fixed``.

        Raises ``ConfigError`` when a layer cannot run on so many devices.
        """
        layers = tuple(layer.served(self.tp_size) for layer in self.model.layers)
        served = self.model if self.tp_size == 1 else replace(self.model, layers=layers)
        return _with_fixed_norms(served) if self.fixed else served

    @cached_property
    def splits_heads(self) -> bool:
        """Whether attention is split; otherwise every device computes all of it."""
        return self.tp_size > 1 and all(layer.mixer.splits(self.tp_size) for layer in self.model.layers)

    def place(self, params: Params) -> Params:
        """Parameters of ``model`` where they are computed; what lies there already is not copied.

        The place is said outright: an array that left it open would make a step that knew another compile again.
        """
        placed: Params = jax.tree.map(self.hold, declare(self.served), self.as_served(params))
        in_large_pages(jax.tree.leaves(placed))
        return placed

    def hold_at(self, path: tuple[Any, ...], weight: NDArray[Any]) -> Array | Packed:
        """The parameter of ``model`` at ``path``, from host memory straight to where each device computes its part."""
        return self.hold(self._specs[path], self._part_as_served(path, weight))

    @cached_property
    def _specs(self) -> dict[tuple[Any, ...], ParamSpec]:
        """The parameters of ``served``, by path."""
        return dict(jax.tree_util.tree_leaves_with_path(declare(self.served)))

    def _part_as_served(self, path: tuple[Any, ...], weight: Any) -> Any:
        top, *rest = path
        if self.tp_size == 1 or top.key != "layers":
            return weight
        layer, *names = rest
        part = functools.reduce(lambda inner, name: {name.key: inner}, reversed(names), weight)
        part = self.model.layers[layer.idx].as_served(part, self.tp_size)
        return functools.reduce(lambda outer, name: outer[name.key], names, part)

    def as_served(self, params: Params) -> Params:
        """Parameters of ``model`` as those of ``served``."""
        if self.tp_size == 1:
            return params
        layers = zip(self.model.layers, params["layers"], strict=True)
        return {**params, "layers": [layer.as_served(part, self.tp_size) for layer, part in layers]}

    def repacking(self, dtype: Any, tensors_of: TensorsOf) -> Repacking:
        """What makes arrays of ``served``, as they lie, of a trainer's trees, without a word on how they are held."""
        specs: list[ParamSpec] = jax.tree.leaves(declare(self.served))
        return Repacking(self.model, dtype, tensors_of, [self._place(spec) for spec in specs], self.as_served)

    def hold(self, spec: ParamSpec, weight: Any) -> Array | Packed:
        """One parameter of ``served`` as it is computed with: placed, and packed where it is to be."""
        how = self._packer(spec)
        if how is None:
            return self.put(weight, self._place(spec))
        return how.packed(map(self.put, how.pack(weight), self._packed_shardings(how, spec)), **self._computed)

    def _packer(self, spec: ParamSpec) -> Packer | None:
        if self.holding is None:
            return None
        form = HOLDINGS[self.holding]
        return packer(form.vocabulary or form.name if "vocab" in spec.axes else form.name, spec.shape, spec.inputs)

    def _packed_shardings(self, how: Packer, spec: ParamSpec) -> list[Sharding]:
        named = zip(how.axes(spec.axes), how.shapes(), strict=True)
        return [self._placed(self._spec(axes, shape)) for axes, (shape, _) in named]

    @property
    def _computed(self) -> dict[str, bool]:
        return {"native": self.native, "fixed": self.fixed}

    @property
    def native(self) -> bool:
        """Whether kernels multiply by packed weights. They know nothing of meshes; XLA does."""
        return self.tp_size == 1 and products.runs(self.platform)

    @property
    def writes_out(self) -> bool:
        """Whether XLA for CPUs multiplies by what packed weights stand for, in steps of many rows if no others."""
        if self.holding is None or self.platform != "cpu":
            return False
        never = self.fixed or HOLDINGS[self.holding].grouped or products.many() == math.inf
        return not (self.native and never)

    @property
    def platform(self) -> str:
        """What the devices are: "cpu", "gpu" or "tpu"."""
        return jax.default_backend() if self.devices is None else self.devices[0].platform

    def put(self, array: Any, where: WeightPlace) -> Array:
        """``array``, the same in all processes that have a part of it, as it lies ``where``."""
        at = sharding_of(where)
        if at.is_fully_addressable or (isinstance(array, Array) and array.sharding == at):
            placed: Array = jax.device_put(array, at)
        else:
            host = np.asarray(array)
            placed = jax.make_array_from_callback(host.shape, at, host.__getitem__)
        # Each device has its part by now: else the whole would be on one while it is brought into order.
        return placed if lies_at(placed, where) else jax.device_put(placed, where)

    def abstract(self, dtype: Any) -> Params:
        """The params as they will lie, as ``jax.ShapeDtypeStruct``: for compiling and sizing without weights."""

        def abstract(spec: ParamSpec) -> Any:
            how = self._packer(spec)
            if how is None:
                return jax.ShapeDtypeStruct(spec.shape, spec.dtype(dtype), sharding=self._place(spec))
            placed = zip(how.shapes(), self._packed_shardings(how, spec), strict=True)
            arrays = (jax.ShapeDtypeStruct(shape, of, sharding=at) for (shape, of), at in placed)
            return how.packed(arrays, **self._computed)

        shapes: Params = jax.tree.map(abstract, declare(self.served))
        return shapes

    def _place(self, spec: ParamSpec) -> WeightPlace:
        at = self._placed(self._spec(spec.axes, spec.shape))
        return in_order(spec.shape, at) if spec.in_order and self.platform == "tpu" else at

    @property
    def whole(self) -> Sharding:
        """The whole of an array on every device."""
        return self._placed(P())

    @property
    def read_from(self) -> Sharding | None:
        """Where what the host reads must lie, since no other process has a part of it; None: anywhere."""
        return None if self.whole.is_fully_addressable else self.whole

    def _placed(self, spec: P) -> Sharding:
        return SingleDeviceSharding(self._chosen[0]) if self.mesh is None else NamedSharding(self.mesh, spec)

    def _spec(self, names: Sequence[str | None], shape: Sequence[int] | None = None) -> P:
        """How an array with these logical axes is split; ``shape``, if given: axes that do not divide stay whole."""
        axes: list[str | None] = []
        for i, name in enumerate(names):
            split = name in _SPLIT and AXIS not in axes and (shape is None or shape[i] % self.tp_size == 0)
            axes.append(AXIS if split and (self.splits_heads or name not in ("heads", "kv_heads")) else None)
        return P(*axes)

    def pool_shardings(self, layout: Layout) -> tuple[Sharding, ...]:
        """Where each buffer of a layer lies."""
        return tuple(self._placed(self._spec(axes)) for axes in layout.axes)

    def page_bytes(self, layout: Layout) -> int:
        """Bytes that one device stores of a page of one layer."""
        placed = zip(layout.buffers(1), self.pool_shardings(layout), strict=True)
        return sum(math.prod(at.shard_shape(array.shape)) * array.dtype.itemsize for array, at in placed)

    def copies(self, layers: Iterable[int]) -> int:
        """How often each KV head of these layers is repeated; 1 where that is not the same for all."""
        found: set[int] = set()
        for layer in layers:
            ours, theirs = (cfg.layers[layer].mixer.stored for cfg in (self.model, self.served))
            if isinstance(ours, Heads) and isinstance(theirs, Heads):
                found.add(theirs.kv_heads // ours.kv_heads)
        return found.pop() if len(found) == 1 else 1

    def local(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Sequence[str | None]],
        outputs: Sequence[Sequence[str | None]],
    ) -> Callable[..., Any]:
        """``function`` as each device runs it on its part of the arguments; see ``models.forward_batch.Local``."""
        if self.mesh is None:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(self._spec(axes) for axes in inputs),
            out_specs=tuple(self._spec(axes) for axes in outputs),
            check_vma=False,
        )

    def by_vocabulary(self, scores: Array) -> Array:
        """Inside a compiled step: ``scores`` [N, V] computed by each device for its own part of the vocabulary.

        Without it XLA gathers the whole embedding on every device, a gigabyte for each step, rather than the scores.
        """
        if self.mesh is None or scores.shape[-1] % self.tp_size:
            return scores
        return jax.lax.with_sharding_constraint(scores, NamedSharding(self.mesh, P(None, AXIS)))

    def everywhere(self, array: Array) -> Array:
        """Inside a compiled step: the whole ``array`` on every device."""
        if self.mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, P()))
