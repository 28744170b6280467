"""The pytest plugin: ``pytest --rootcellar-store module:Class`` runs the suite, and nothing else, against a store.

Whatever the store holds is deleted: give it settings of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # this module is loaded whenever pytest runs, and is to cost nothing
    from rootcellar.tiers.conformance.subject import ServerProcess, Subject
    from rootcellar.tiers.store import Store

_SUITE = "rootcellar.tiers.conformance.suite"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the suite."""
    group = parser.getgroup("rootcellar", "stores of rootcellar")
    group.addoption(
        "--rootcellar-store",
        metavar="STORE",
        help="run rootcellar's suite against a store: module:Class, file.py:Class, or the name of a storage backend; "
        "whatever it holds is deleted",
    )
    group.addoption(
        "--rootcellar-store-extra-config", metavar="JSON", help="its settings: JSON, or @ and a file (JSON, TOML, YAML)"
    )
    group.addoption(
        "--rootcellar-store-server",
        metavar="COMMAND",
        help="starts the store's server and stays; it is killed and started again, and tests that need it are run",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Run the suite in place of what lies about, unless tests were named."""
    if config.getoption("--rootcellar-store") and config.args_source is not pytest.Config.ArgsSource.ARGS:
        spec = find_spec(_SUITE)
        assert spec is not None
        config.args[:] = [str(spec.origin)]


@pytest.fixture(scope="session")
def rootcellar_store_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess | None]:
    """The server that ``--rootcellar-store-server`` starts."""
    from rootcellar.tiers.conformance.subject import ServerProcess

    command = request.config.getoption("--rootcellar-store-server")
    if not command:
        yield None
        return

    def answers() -> None:
        store = _open(request.config)
        try:
            store.has([bytes(32)])
        finally:
            store.close()

    server = ServerProcess(shlex.split(command), tmp_path_factory.mktemp("server") / "log", answers)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def subject(request: pytest.FixtureRequest, rootcellar_store_server: ServerProcess | None) -> Subject:
    """What ``--rootcellar-store`` names, emptied."""
    from rootcellar.tiers.conformance.subject import Subject

    if not request.config.getoption("--rootcellar-store"):
        pytest.fail("name a store: --rootcellar-store module:Class")

    def opened() -> Store:
        return _open(request.config)

    store = opened()
    store.clear()
    store.close()
    return Subject(opened, opened, rootcellar_store_server)


def _open(config: pytest.Config) -> Store:
    from rootcellar.tiers.settings import read_extra
    from rootcellar.tiers.stores.dynamic import open_class
    from rootcellar.tiers.stores.registry import open_bare

    named = str(config.getoption("--rootcellar-store"))
    extra: Mapping[str, object] = read_extra(config.getoption("--rootcellar-store-extra-config"))
    module, colon, cls = named.rpartition(":")
    if not colon:
        return open_bare(named, extra, "conformance")
    if module.endswith(".py"):
        module = str(Path(module).resolve())
    return open_class(module, cls, extra, "conformance")
