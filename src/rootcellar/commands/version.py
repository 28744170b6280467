"""``rootcellar version``: the versions of rootcellar and of what it stands on."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import rootcellar
from rootcellar.cache import CORE


def configure(_parser: argparse.ArgumentParser) -> None:
    """It has no options."""


def run(_args: argparse.Namespace) -> int:
    """Print them."""
    print(f"rootcellar {rootcellar.__version__}")
    for package in ("jax", "jaxlib", "numpy"):
        print(f"{package} {importlib.metadata.version(package)}")
    print(f"Python {platform.python_version()}")
    print(f"cache core: {CORE}")
    return 0
