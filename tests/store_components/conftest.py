"""The component that ``--component`` names, started once for all tests; what cannot be had is skipped and said."""

import json
import os
import sys
from pathlib import Path

import pytest
from components import COMPONENTS, Missing

BY_DAY = {
    "test_any_mix_of_present_and_missing",
    "test_another_length_is_a_miss",
    "test_after_a_clearing_nothing_is_there_and_all_can_be_put_again",
    "test_what_was_put_outlives_whoever_put_it",
    "test_two_clients_at_once",
    "test_what_is_not_the_page_is_a_miss",
}
"""What AIBrix's store is asked by day: each test starts its process, which imports torch."""
TOLD = pytest.StashKey[dict]()
"""What ``--told`` is to hold."""
STATUS = pytest.StashKey[int]()
"""That of the run."""
DEVICES = "--xla_force_host_platform_device_count=2"
"""Of tests that compute on two devices."""


def pytest_addoption(parser):
    parser.addoption("--component", choices=list(COMPONENTS), help="which to test")
    parser.addoption("--kills", type=int, default=3, help="how often its server is killed while engines use it")
    parser.addoption("--told", type=Path, help="a file that says of it, as JSON, what ran")


def pytest_configure(config):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
    config.stash[TOLD] = {"counts": {}, "said": [], "skipped": []}


@pytest.fixture(scope="session")
def component(request, tmp_path_factory):
    name = request.config.getoption("--component")
    if name is None:
        pytest.skip("no --component: make test-stores runs them all")
    try:
        started = COMPONENTS[name](tmp_path_factory.mktemp(name))
    except Missing as missing:
        pytest.skip(str(missing))
    request.config.stash[TOLD]["version"] = started.version
    yield started
    started.stop()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.parent.name == "store_components":
            item.add_marker(pytest.mark.stores)
            if "killed" in item.originalname:  # some servers take seconds to start again
                item.add_marker(pytest.mark.timeout(max(300, 30 * config.getoption("--kills"))))
            slow = config.getoption("--component") == "aibrix" and item.path.name == "test_components.py"
            if slow and item.originalname not in BY_DAY:
                item.add_marker(pytest.mark.long)


def pytest_terminal_summary(terminalreporter, config):
    told = config.stash[TOLD]
    for what in ("passed", "failed", "error", "skipped", "deselected"):
        if reports := terminalreporter.stats.get(what):
            told["counts"][what] = len(reports)
    for report in terminalreporter.stats.get("passed", []):
        told["said"] += [value for name, value in report.user_properties if name == "said"]
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])}
    told["skipped"] = sorted(reasons)
    if path := config.getoption("--told"):
        path.write_text(json.dumps(told))


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """A library of NIXL's wheel (libnl) faults when a process ends in which UCX was used: end it before that."""
    if str(config.getoption("--component")).startswith("nixl") and STATUS in config.stash:
        sys.stdout.flush()
        os._exit(config.stash[STATUS])
