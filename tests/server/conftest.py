"""One engine for the tests of this folder, and one server over it; what a test leaves behind is checked after each."""

from __future__ import annotations

import httpx
import pytest

import rootcellar
from serving import idle, on_thread


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
