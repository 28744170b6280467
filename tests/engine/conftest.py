"""One engine for the tests of its interface."""

import pytest
from idle import check_idle

import rootcellar


@pytest.fixture(scope="package")
def tiny_engine(tiny_folder):
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=1024, max_running_requests=4, chunked_prefill_size=64
    ) as engine:
        yield engine


@pytest.fixture
def engine(tiny_engine):
    """Whatever a test does, the engine is whole and idle after it."""
    yield tiny_engine
    check_idle(tiny_engine)
