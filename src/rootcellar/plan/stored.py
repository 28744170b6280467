"""What one layer stores of a token or a request, in elements: plain values that models and the planner share.

How the elements lie and how wide they are is the business of a layout (``rootcellar.pools.layouts``).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from rootcellar.errors import ConfigError
from rootcellar.plan.grids import NARROW

Form = Literal["heads", "latents", "states", "routes"]
"""Keys and values by head; latents that all heads share; recurrent states, one for each request; the experts that
routers chose."""
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element of weights, activations and what is cached as it is, by the name that configs give the type."""
SHORT_NAMES = {"bf16": "bfloat16"}
"""Other names of the KV cache's types."""
WIDE = "bfloat16"
"""The type of what stays wide in a KV cache of few bits: inputs of convolutions, and the turned part of a latent."""
LATENT_TYPES = ("int8", "fp8_e4m3", "fp8_e5m2")
"""Types of few bits that a latent is kept in."""
STATE_ITEMSIZE = 4
"""Bytes of an element of a recurrent state: it accumulates over the whole sequence, so it stays float32."""


class Stored(Hashable, Protocol):
    """What a layer stores. One frozen dataclass for each ``Form``."""

    @property
    def form(self) -> Form:
        """Which form it has."""
        ...

    def token_bytes(self, kv_cache_dtype: str, tp: int = 1) -> int:
        """Bytes that one device of ``tp`` stores of one token in one layer; 0 for states.

        Raises ``ConfigError`` where this is not stored in such a type.
        """
        ...

    def request_bytes(self, kv_cache_dtype: str) -> int:
        """Bytes that each device stores of one request in one layer, whatever its length; 0 where tokens are stored."""
        ...

    def formula(self, kv_cache_dtype: str) -> str:
        """How the bytes of one token in one layer are counted, or those of one request."""
        ...

    def divided(self, tp: int) -> str:
        """What becomes of it on ``tp`` devices, in words."""
        ...


@dataclass(frozen=True, slots=True)
class Heads:
    """K and V by head: MHA, GQA, MQA. ``group``: query heads that share a KV head."""

    form: ClassVar[Form] = "heads"
    kv_heads: int
    head_dim: int
    group: int = 1

    def token_bytes(self, kv_cache_dtype: str, tp: int = 1) -> int:
        """Heads are split; with fewer than devices each is repeated, and its query heads divided among the copies.

        Where neither comes out even every device computes all of the attention, and stores all heads.
        """
        if self.kv_heads % tp == 0:
            heads = self.kv_heads // tp
        elif tp % self.kv_heads == 0 and self.group % (tp // self.kv_heads) == 0:
            heads = 1
        else:
            heads = self.kv_heads
        return heads * sum(self._pair(kv_cache_dtype))

    def _pair(self, kv_cache_dtype: str) -> tuple[int, int]:
        """Bytes of a key and of a value."""
        narrow = NARROW.get(kv_cache_dtype)
        if narrow is None:
            return (self.head_dim * DTYPES[kv_cache_dtype],) * 2
        return narrow.keys.vector_bytes(self.head_dim), narrow.values.vector_bytes(self.head_dim)

    def request_bytes(self, kv_cache_dtype: str) -> int:  # noqa: ARG002
        """See ``Stored``."""
        return 0

    def formula(self, kv_cache_dtype: str) -> str:
        """See ``Stored``."""
        if kv_cache_dtype in NARROW:
            keys, values = self._pair(kv_cache_dtype)
            return f"{self.kv_heads} KV heads x ({keys} of a key + {values} of a value) bytes"
        return f"2 x {self.kv_heads} KV heads x {self.head_dim} x {DTYPES[kv_cache_dtype]} bytes"

    def divided(self, tp: int) -> str:
        """See ``Stored``."""
        return f"KV heads split over tp={tp} devices; repeated where they are fewer, all on each if uneven"


@dataclass(frozen=True, slots=True)
class Latents:
    """Multi-head latent attention: one compressed vector for all heads, and the rotated part of the keys."""

    form: ClassVar[Form] = "latents"
    rank: int
    rope_dim: int

    def token_bytes(self, kv_cache_dtype: str, tp: int = 1) -> int:  # noqa: ARG002
        """See ``Stored``: every device needs the whole latent."""
        return self.rank_bytes(kv_cache_dtype) + self.rope_dim * DTYPES.get(kv_cache_dtype, DTYPES[WIDE])

    def rank_bytes(self, kv_cache_dtype: str) -> int:
        """Bytes of the compressed part, which is key and value at once: no type that holds the two apart has it."""
        if kv_cache_dtype in DTYPES:
            return self.rank * DTYPES[kv_cache_dtype]
        if kv_cache_dtype not in LATENT_TYPES:
            known = ", ".join((*DTYPES, *LATENT_TYPES))
            raise ConfigError(f"kv_cache_dtype={kv_cache_dtype!r} has no layout of latents: choose from {known}")
        return NARROW[kv_cache_dtype].keys.vector_bytes(self.rank)

    def request_bytes(self, kv_cache_dtype: str) -> int:  # noqa: ARG002
        """See ``Stored``."""
        return 0

    def formula(self, kv_cache_dtype: str) -> str:
        """See ``Stored``."""
        if kv_cache_dtype in NARROW:
            return f"({self.rank_bytes(kv_cache_dtype)} latent + {self.rope_dim} rope x {DTYPES[WIDE]}) bytes"
        return f"({self.rank} latent + {self.rope_dim} rope) x {DTYPES[kv_cache_dtype]} bytes"

    def divided(self, tp: int) -> str:
        """See ``Stored``."""
        return f"a latent has no heads to split: each of tp={tp} devices keeps all of it"


@dataclass(frozen=True, slots=True)
class States:
    """What a recurrent layer (Mamba, gated delta) keeps of one request, whole on each device.

    Attributes:
        conv: shape of the last inputs of its convolution: (inputs kept of each channel, channels).
        state: shape of the recurrent state, which is float32.
    """

    form: ClassVar[Form] = "states"
    conv: tuple[int, int]
    state: tuple[int, ...]

    def token_bytes(self, kv_cache_dtype: str, tp: int = 1) -> int:  # noqa: ARG002
        """See ``Stored``."""
        return 0

    def request_bytes(self, kv_cache_dtype: str) -> int:
        """See ``Stored``."""
        return math.prod(self.conv) * self._itemsize(kv_cache_dtype) + math.prod(self.state) * STATE_ITEMSIZE

    def _itemsize(self, kv_cache_dtype: str) -> int:
        """Of the convolution's inputs; a recurrent state does not follow the KV cache's dtype."""
        return DTYPES.get(kv_cache_dtype, DTYPES[WIDE])

    def formula(self, kv_cache_dtype: str) -> str:
        """See ``Stored``."""
        taps, channels = self.conv
        elements, itemsize = math.prod(self.state), self._itemsize(kv_cache_dtype)
        return f"({channels} conv channels x {taps} taps x {itemsize} + {elements} state x {STATE_ITEMSIZE})"

    def divided(self, tp: int) -> str:
        """See ``Stored``."""
        return f"each of tp={tp} devices keeps the whole state"


@dataclass(frozen=True, slots=True)
class Routes:
    """The experts that all routers of a model chose for a token, for whoever trains on its answers.

    Attributes:
        layers: layers that have a router.
        top_k: experts that each chooses.
        experts: how many it chooses from.
    """

    form: ClassVar[Form] = "routes"
    layers: int
    top_k: int
    experts: int

    @property
    def dtype(self) -> str:
        """The narrowest type that has a number for each expert."""
        return "uint8" if self.experts <= 2**8 else "uint16"

    def token_bytes(self, kv_cache_dtype: str, tp: int = 1) -> int:  # noqa: ARG002
        """See ``Stored``: those of all layers."""
        return self.layers * self.top_k * (1 if self.dtype == "uint8" else 2)

    def request_bytes(self, kv_cache_dtype: str) -> int:  # noqa: ARG002
        """See ``Stored``."""
        return 0

    def formula(self, kv_cache_dtype: str) -> str:  # noqa: ARG002
        """See ``Stored``."""
        return f"{self.layers} routers x {self.top_k} experts of {self.dtype}"

    def divided(self, tp: int) -> str:
        """See ``Stored``."""
        return f"each of tp={tp} devices keeps the experts of all layers"
