"""Lets the tests of this folder import its world and its fuzz driver, and runs what asks for a ``core`` on both."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import helpers


@pytest.fixture(params=["python", "native"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each core in turn is what ``helpers.RadixCache`` makes."""
    if request.param not in helpers.CORES:
        pytest.skip("the native core was not built")
    monkeypatch.setattr(helpers, "core", request.param)
    return request.param
