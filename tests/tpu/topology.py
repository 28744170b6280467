"""Devices that are not here: libtpu compiles for what a topology describes."""

from __future__ import annotations

import functools
import os

import jax

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
"""Eight chips of each sort."""


@functools.cache
def devices(chip: str) -> tuple[jax.Device, ...]:
    """Eight devices of a sort; raises what libtpu does where it is not installed."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it asks the network which machine this is
    from jax.experimental import topologies

    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices)
