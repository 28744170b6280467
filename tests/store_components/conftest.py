"""Components that are started once for all tests, and skipped with the reason where they cannot be."""

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
RAN = pytest.StashKey[set[str]]()
"""What ran, in which version."""


@pytest.fixture(scope="session", params=COMPONENTS)
def component(request, tmp_path_factory):
    try:
        started = COMPONENTS[request.param](tmp_path_factory.mktemp(request.param))
    except Missing as missing:
        pytest.skip(str(missing))
    request.config.stash.setdefault(RAN, set()).add(f"{request.param}: {started.version}")
    yield started
    started.stop()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "store_components":
            item.add_marker(pytest.mark.stores)
            if "[aibrix" in item.name and item.path.name == "test_components.py" and item.originalname not in BY_DAY:
                item.add_marker(pytest.mark.long)


def pytest_terminal_summary(terminalreporter, config):
    for line in sorted(config.stash.get(RAN, set())):
        terminalreporter.write_line(line)
