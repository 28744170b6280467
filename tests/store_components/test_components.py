"""What every store has to keep to, kept by each of those that stand on other people's components."""

import pytest

from rootcellar.tiers.conformance.suite import *  # noqa: F403


@pytest.fixture
def subject(component):
    return component.subject()
