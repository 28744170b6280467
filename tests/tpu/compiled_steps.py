"""Steps of a model compiled for devices that are not here, and what is seen in the programs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from full_size import model_of
from hlo import Computation, Instruction, accounts, entry, everywhere, parse
from topology import devices

from rootcellar.models.kinds import paging
from rootcellar.models.places import device_bytes
from rootcellar.ops import slots
from rootcellar.ops.backends import Reach, choose_backend, preferred, tpu
from rootcellar.ops.paged import NAME
from rootcellar.plan import roofline
from rootcellar.plan.sizing import BLOCK_TOKENS
from rootcellar.pools.layouts import page_bytes
from rootcellar.runner import Placement, Programs, Shapes
from rootcellar.runner.reserve import arguments

PAGE, BATCH, CONTEXT, CHUNK = 16, 64, 8192, 512


@dataclass(frozen=True)
class Case:
    """A model on ``tp`` chips of a sort. ``backend``: of attention, by name; "auto": what an engine would take."""

    model: str
    chip: str
    tp: int
    backend: str = "auto"

    def __str__(self) -> str:
        return f"{self.model}-{self.chip}-tp{self.tp}-{self.backend}"

    @cached_property
    def programs(self) -> Programs:
        cfg, _ = model_of(self.model)
        placement = Placement(cfg, self.tp, devices=devices(self.chip))
        pages = paging(placement.served, "bfloat16", PAGE, arena=True)
        backend = choose_backend(self.backend, pages.attended, "tpu")
        laid = pages.laid(lambda layout: preferred(backend, layout, "tpu"))
        return Programs(
            placement, jnp.dtype(jnp.bfloat16), laid, backend, Shapes.of(CHUNK, BATCH), CONTEXT // PAGE, 20
        )  # fmt: skip

    @property
    def pages(self) -> dict[str, int]:
        """Of each pool, padding left out: the whole batch at its full length, or a state to read and one to write."""
        recurrent = {k.name for k in self.programs.paging.kinds if k.rule == "recurrent"}
        return {
            name: 2 * BATCH if name in recurrent else BATCH * CONTEXT // PAGE for name in self.programs.paging.pools
        }

    def arguments(self, tile: int) -> tuple[Any, ...]:
        """Of the step of the whole batch, or of a chunk of a prompt, with pools of their real size."""
        programs = self.programs
        placement = programs.placement
        tiles = BATCH if tile == 1 else CHUNK // tile
        params, _, *rest = arguments(programs, tiles, tile)
        buffers = {
            name: [
                tuple(
                    jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at)
                    for a, at in zip(
                        layout.buffers(self.pages[name] + 1), placement.pool_shardings(layout), strict=True
                    )
                )
            ]
            * layers
            for name, (layout, layers) in programs.paging.pools.items()
        }
        placed = (
            jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement.whole), x) for x in rest
        )
        return params, buffers, *placed

    def compile(self, tile: int) -> Step:
        """Decode (``tile`` 1) or prefill."""
        with jax.default_device(None):
            compiled = self.programs.step.lower(*self.arguments(tile)).compile()
        return Step(self, tile, compiled)


@dataclass(frozen=True)
class Step:
    """A compiled step."""

    case: Case
    tile: int
    compiled: Any

    @cached_property
    def module(self) -> dict[str, Computation]:
        return parse(self.compiled.as_text())

    @cached_property
    def memory(self) -> Any:
        return self.compiled.memory_analysis()

    @cached_property
    def sizes(self) -> dict[str, list[int]]:
        """Bytes that a device has of each weight and of each buffer of the pools."""
        params, buffers, *_ = self.case.arguments(self.tile)
        return {
            "weights": [*map(device_bytes, jax.tree.leaves(params))],
            "pools": [*map(device_bytes, jax.tree.leaves(buffers))],
        }

    def copies_of_pools(self) -> list[str]:
        """Instructions that give an array with as many pages as a pool has, and are no write in place.

        But for the inputs of convolutions, three of each channel: a few megabytes that XLA turns over as it likes.
        """
        pages = {n + 1 for n in self.case.pages.values()}
        return [
            f"{i.name}: {i.opcode} of {i.values}"
            for i in everywhere(self.module)
            if i.opcode in ("copy", "copy-start", "transpose", "reshape", "convert", "pad", "concatenate", "broadcast")
            and any(v.moved >= 2**24 and pages & {*v.shape} for v in i.values)
        ]

    def gathers(self) -> list[str]:
        """Collectives that bring together more than a step's activations: weights or pools."""
        cfg = self.case.programs.placement.served
        tokens = max(BATCH, CHUNK)
        most = 4 * tokens * max(cfg.hidden_size, cfg.vocab_size * BATCH // tokens)
        return [
            f"{i.name}: {i.opcode} of {i.values}"
            for i in everywhere(self.module)
            if re.match("all-gather|all-to-all|collective-permute", i.opcode) and i.nbytes > most
        ]

    @property
    def xla_bytes(self) -> float:
        """What XLA says that a device accesses."""
        return float(self.compiled.cost_analysis().get("bytes accessed", 0.0))

    @cached_property
    def moved(self) -> list[tuple[Instruction, int]]:
        """Bytes by instruction, for a batch whose every request has ``CONTEXT`` tokens."""
        per_kernel = self._kernel_bytes()

        def loops(each: Instruction) -> int:
            return -(-CONTEXT // BLOCK_TOKENS)

        def kernels(each: Instruction) -> int:
            if NAME in each.rest:
                return per_kernel.pop(0)
            named = entry(self.module).instructions
            given = [named[name] for name in each.operands if name in named]
            if slots.NAME in each.rest:  # the pool comes and goes last
                (y, pool), told = each.values, given[:-1]
                return slots.moved_bytes(pool.shape, BATCH) + y.moved + sum(operand.moved for operand in told)
            # XLA's own, for experts: as if each were passed.
            return each.moved + sum(operand.moved for operand in given)

        return accounts(self.module, loops, kernels)

    def _kernel_bytes(self) -> list[int]:
        """What each layer's attention reads on a device, in the order of the layers."""
        programs = self.case.programs
        last = np.full(BATCH, CONTEXT - 1)
        found = {}
        for kind in programs.paging.kinds:
            if kind.rule != "recurrent":
                layout = programs.paging.layouts[kind.name]
                whole = tpu.read_bytes(layout, Reach(kind.rule, kind.span), last, last)
                share = programs.placement.page_bytes(layout) / page_bytes(layout)
                found |= dict.fromkeys(kind.layers, round(whole * share))
        return [found[layer] for layer in sorted(found)]

    @cached_property
    def least(self) -> float:
        """Bytes that a device must move: the roofline's."""
        return roofline.decode(model_of(self.case.model)[1], "bfloat16", self.case.tp, BATCH, CONTEXT).total_bytes

    def row(self) -> dict[str, Any]:
        """What the table says."""
        m = self.memory
        shown = {
            "case": str(self.case),
            "step": "decode" if self.tile == 1 else "prefill",
            "aliased": m.alias_size_in_bytes,
            "temporaries": m.temp_size_in_bytes,
            "arguments": m.argument_size_in_bytes,
            "xla": self.xla_bytes,
        }
        if self.tile == 1:
            moved = sum(n for _, n in self.moved)
            shown |= {"moved": moved, "least": self.least, "ratio": moved / self.least}
        return shown


__all__ = ["BATCH", "CHUNK", "CONTEXT", "PAGE", "Case", "Step", "entry", "replace"]
