"""One engine for the tests of this folder, and one server over it; what a test leaves behind is checked after each."""

from __future__ import annotations

import httpx
import pytest

import rootcellar
from serving import on_thread, wait_until


@pytest.fixture(scope="session")
def engine():
    with rootcellar.Engine(model_path="demo", max_total_tokens=4096, max_queued_requests=64) as engine:
        yield engine


@pytest.fixture(scope="session")
def url(engine):
    with on_thread(engine, max_n=8, max_batch_size=16) as url:
        yield url


@pytest.fixture
def client(url, engine):
    """An HTTP client; afterwards nothing runs, nothing is pinned, and the cache's invariants hold."""
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
    idle(engine)


def idle(engine) -> None:
    """Wait for the engine to come to rest, and see that nothing leaked."""
    wait_until(lambda: not (engine.stats()["running"] or engine.stats()["waiting"]))
    engine.check()
    shelf = engine.stats()["cache"]["full"]["DEVICE"]
    assert shelf["free"] + shelf["cached"] == shelf["size"]
    assert shelf["pinned"] == shelf["leased"] == 0
