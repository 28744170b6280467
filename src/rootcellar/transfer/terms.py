"""What two nodes must have in common to give each other pages: said when they meet, compared by both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from rootcellar.transfer.wires.tcp import WireError

PROTOCOL = 2


@dataclass(frozen=True, slots=True)
class Terms:
    """Of one node.

    Attributes:
        page_size: tokens in a page.
        dtype, kv_cache_dtype: what the model computes in, and what its cache holds.
        kinds: name, rule and span of each.
        image_bytes: of a page of each kind.
        wire: how pages go.
        model: the architecture; ``fingerprint``: all of the model that changes a page's bytes, in hexadecimals.

    What the weights are may change, and is said in each room.
    """

    page_size: int
    dtype: str
    kv_cache_dtype: str
    kinds: tuple[tuple[str, str, int], ...]
    image_bytes: Mapping[str, int]
    model: str
    fingerprint: str
    wire: str = "tcp"
    protocol: int = field(default=PROTOCOL)

    def plain(self) -> dict[str, Any]:
        """As values of JSON."""
        said = {name: getattr(self, name) for name in self.__slots__}
        return {**said, "kinds": [list(kind) for kind in self.kinds], "image_bytes": dict(self.image_bytes)}

    @classmethod
    def read(cls, said: object) -> Self:
        """The inverse of :meth:`plain`. Raises ``WireError`` for anything else."""
        try:
            if not isinstance(said, dict):
                raise TypeError("no object")
            kinds = tuple((str(name), str(rule), int(span)) for name, rule, span in said["kinds"])
            sizes = {str(name): int(size) for name, size in said["image_bytes"].items()}
            words = {name: str(said[name]) for name in ("dtype", "kv_cache_dtype", "model", "fingerprint", "wire")}
            return cls(
                page_size=int(said["page_size"]),
                kinds=kinds,
                image_bytes=sizes,
                protocol=int(said["protocol"]),
                **words,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WireError(f"the other node does not say what it has, as a rootcellar does: {error!r}") from None

    def differences(self, other: Terms, ours: str, theirs: str) -> str:
        """What is not equal, with both values; empty where all is. ``ours``, ``theirs``: as ``"the prefill node"``."""
        mine, its = self.plain(), other.plain()
        told = [
            f"{name} is {mine[name]!r} on {ours} and {its[name]!r} on {theirs}"
            for name in self.__slots__
            if mine[name] != its[name]
        ]
        return "; ".join(told)
