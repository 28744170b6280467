"""Regular expressions as clients mean them, in llguidance's words."""

from __future__ import annotations

import re

_ASCII = {"d": "[0-9]", "w": "[0-9A-Za-z_]", "s": r"[ \t\n\r\f\v]"}
_ASCII |= {name.upper(): "[^" + chars[1:] for name, chars in _ASCII.items()}
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_SLASH = re.compile(r"(\\.)|/", re.DOTALL)


def ascii_classes(pattern: str) -> str:
    r"""``pattern`` with ``\d``, ``\w`` and ``\s`` (and their opposites) meaning ASCII, as in xgrammar and outlines.

    llguidance reads them as Unicode's: ``\d`` would take the digits of forty scripts. A class within a class is one.
    """
    return _ESCAPE.sub(lambda found: _ASCII.get(found[1], found[0]), pattern)


def in_lark(pattern: str) -> str:
    """``pattern`` as a terminal of Lark's, between slashes: one that was escaped already stays so."""
    escaped = _SLASH.sub(lambda found: found[1] or r"\/", ascii_classes(pattern))
    return "/" + escaped.replace("\n", r"\n") + "/"
