"""One engine for the tests of its interface."""

import functools

import pytest
from idle import check_idle

import rootcellar
from checkpoints import golden


@pytest.fixture(scope="package")
def case_of(tmp_path_factory):
    """A golden case and its checkpoint's folder, by name; made once."""

    @functools.cache
    def make(name):
        case, folder = golden(name), tmp_path_factory.mktemp(name)
        case.make(folder)
        return case, folder

    return make


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
