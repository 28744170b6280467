"""Amounts of memory as people write them. GB is 10^9 bytes, GiB is 2^30."""

from __future__ import annotations

import re
from decimal import Decimal

from rootcellar.errors import ConfigError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


def parse_bytes(text: str, name: str) -> int:
    """Bytes in ``"141GB"``, ``"89.71GiB"`` or ``"4000000000"``; ``name`` is the option, for the message.

    Raises ``ConfigError`` for anything else, and for less than one byte.
    """
    found = re.fullmatch(r"([0-9]+\.?[0-9]*)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    unit = _UNITS.get(found[2].upper()) if found else None
    # Decimal, because 89.71 GiB in binary floating point is off by a byte or two.
    nbytes = 0 if found is None or unit is None else int(Decimal(found[1]) * unit)
    if nbytes < 1:
        raise ConfigError(f"{name}={text!r} is not an amount of memory: write it like 4GB, 512MiB or 4000000000.")
    return nbytes


def gb(nbytes: float) -> str:
    """``nbytes`` in GB (10^9 bytes) with two decimals, or more where two would show nothing."""
    value = nbytes / 1e9
    return f"{value:.2f}" if abs(value) >= 0.1 or nbytes == 0 else f"{value:.3g}"
