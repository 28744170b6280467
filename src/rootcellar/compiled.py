"""The optional C++ parts that XLA calls: opened where they were built, registered with it, or done without."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax

from rootcellar.errors import ConfigError

log = logging.getLogger(__name__)


def open_library(
    folders: Iterable[str], file: str, targets: Mapping[str, str], without: str, functions: Iterable[str] = ()
) -> ctypes.CDLL | None:
    """The shared library ``file`` of a package, its handlers registered with XLA's foreign function interface for CPUs.

    Args:
        folders: the package's ``__path__``: an editable install keeps what was compiled apart from the sources.
        file: the library's name.
        targets: the function in it that each name of a call stands for.
        without: what happens where there is none, for the log.
        functions: what is called in it beside its handlers.

    Returns:
        None where it was not built, or is not wanted (``ROOTCELLAR_NO_NATIVE=1``).

    Raises:
        ConfigError: it lacks a function, since it was built from other sources than these.
    """
    if os.environ.get("ROOTCELLAR_NO_NATIVE") == "1":
        return None
    found = [path for folder in folders if (path := Path(folder) / file).exists()]
    if not found:
        log.info("%s was not built: %s", file, without)
        return None
    opened = ctypes.CDLL(str(found[0]))
    try:
        called = {name: opened[name] for name in (*targets.values(), *functions)}
    except AttributeError as error:
        raise ConfigError(
            f"{found[0]} is not of the Python beside it ({error}): build rootcellar again (pip install), or set "
            "ROOTCELLAR_NO_NATIVE=1 to do without"
        ) from None
    for name, function in targets.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(called[function]), platform="cpu")
    return opened
