"""Bytes of pages on their way between tiers, and the stores beyond them. Import the module that you mean."""

import os
from importlib.util import find_spec

NATIVE = os.environ.get("ROOTCELLAR_NO_NATIVE") != "1" and find_spec("rootcellar.tiers._slots") is not None
"""Whether C++ does the work of ``native/slots.cc``."""
