"""The kernels for CPUs in C++ (``ops/native/``), behind XLA's foreign-function interface.

They are compiled for several instruction sets, of which the fastest runs that the processor has; ``ROOTCELLAR_VECTORS``
names another (``avx512vnni``, ``avx512``, ``avx2``, ``baseline``).
"""

from __future__ import annotations

import ctypes
import functools
import os

from rootcellar import ops
from rootcellar.compiled import open_library

# What XLA calls each handler, and the function of the library.
_FUNCTIONS = {
    "rootcellar_attention_by_head": "RootcellarAttentionByHead",
    "rootcellar_attention_over_codes": "RootcellarAttentionOverCodes",
    "rootcellar_attention_over_latents": "RootcellarAttentionOverLatents",
    "rootcellar_convolution": "RootcellarConvolution",
    "rootcellar_peaks": "RootcellarPeaks",
    "rootcellar_product": "RootcellarProduct",
    "rootcellar_states": "RootcellarStates",
}


@functools.cache
def built() -> ctypes.CDLL | None:
    """The shared library, registered with XLA; None where it was not built or is not wanted."""
    without = "attention, products and recurrent states run through XLA"
    return open_library(ops.__path__, "_native.so", _FUNCTIONS, without, functions=["rootcellar_runs_vectors"])


def runs_vectors(name: str) -> bool:
    """Whether there are kernels for the instruction set of that name, and this processor has it; ``""``: for any."""
    opened = built()
    return opened is not None and bool(opened.rootcellar_runs_vectors(name.encode()))


def vectors() -> str:
    """The instruction set that is wanted, by name; ``""``: the best."""
    return os.environ.get("ROOTCELLAR_VECTORS", "")
