"""The tools that a request offers, as far as parsers need to know them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tools:
    """``schemas``: of each tool's arguments, by its name."""

    schemas: Mapping[str, Mapping[str, Any]]

    @property
    def names(self) -> frozenset[str]:
        """Their names."""
        return frozenset(self.schemas)

    def takes_text(self, name: str, parameter: str) -> bool:
        """Whether this parameter of a tool is a text, or nothing is known of it."""
        properties = self.schemas.get(name, {}).get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        return kind is None or kind == "string"
