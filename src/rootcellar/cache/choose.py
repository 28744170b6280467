"""The one place that chooses: the native core where it was built, unless ``ROOTCELLAR_NO_NATIVE=1``; else Python's.

Both have the same verbs, results, errors and state, so nothing else asks which one runs.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rootcellar.cache.digest import chain as python_chain
from rootcellar.cache.digest import seed_digest
from rootcellar.cache.key import Key

CORE = "python"
"""The core that runs: ``"native"`` or ``"python"``."""

if os.environ.get("ROOTCELLAR_NO_NATIVE") != "1" and find_spec("rootcellar.cache._core") is not None:
    CORE = "native"

if TYPE_CHECKING or CORE == "python":
    from rootcellar.cache.lease import Lease
    from rootcellar.cache.match import Hit
    from rootcellar.cache.radix import PyRadixCache as RadixCache
    from rootcellar.cache.suffixes import PySuffixes as Suffixes

    chain = python_chain
else:
    from rootcellar.cache import _core
    from rootcellar.cache.native import NativeRadixCache as RadixCache

    Hit, Lease, Suffixes, chain = _core.Hit, _core.Lease, _core.Suffixes, _core.chain


def digests(key: Key, page_size: int, fingerprint: bytes = b"") -> list[bytes]:
    """One 32-byte digest per whole page of a key, each over all tokens up to the page's end (see ``digest.py``)."""
    return chain(seed_digest(fingerprint, key.namespace, page_size), key.tokens, page_size)


__all__ = ["CORE", "Hit", "Lease", "RadixCache", "Suffixes", "digests"]
