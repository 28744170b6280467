"""Numbers among settings that were read from JSON or TOML."""

from __future__ import annotations

import math

from rootcellar.errors import ConfigError


def positive(extra: dict[str, object], name: str, usual: float, *, whole: bool = False, zero: bool = False) -> float:
    """Take ``name`` out of ``extra``; ``usual`` where it is not there.

    Raises ``ConfigError``: it is no finite number above 0 (``zero``: or 0), or no ``whole`` one.
    """
    value = extra.pop(name, usual)
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if (number > 0 or (zero and number == 0)) and math.isfinite(number) and (number.is_integer() or not whole):
        return number
    kind = "a whole number" if whole else "a number"
    raise ConfigError(f"{name}={value!r} is not allowed: give {kind} {'from 0 on' if zero else 'above 0'}")
