"""Arrays that somebody holds."""

import gc

import jax


def alive() -> list[jax.Array]:
    """All arrays but what waits to be collected: engines of earlier tests may be in circles, and end at any time."""
    gc.collect()
    return jax.live_arrays()
