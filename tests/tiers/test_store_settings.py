"""What ``--hicache-storage-backend-extra-config`` says: of prefetching, of the guard, and of the store."""

import pytest

from rootcellar.errors import ConfigError
from rootcellar.tiers.prefetching import PrefetchSettings
from rootcellar.tiers.stores import open_store


def test_settings_of_prefetching_are_split_from_those_of_the_store():
    given = {"path": "/pages", "prefetch_threshold": 32, "prefetch_timeout_base": 1, "prefetch_timeout_max": 4.5}
    settings, rest = PrefetchSettings.split(given)
    assert settings == PrefetchSettings(32, 1.0, 0.1, 4.5)
    assert rest == {"path": "/pages"}
    assert len(given) == 4
    assert PrefetchSettings.split({}) == (PrefetchSettings(256, 2.0, 0.1, 30.0), {})


def test_a_longer_prefix_is_waited_for_longer_up_to_the_most():
    settings = PrefetchSettings()
    assert settings.timeout(0) == 2.0
    assert settings.timeout(10 * 1024) == pytest.approx(3.0)
    assert settings.timeout(10**6) == 30.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefetch_threshold", 2.5),
        ("prefetch_threshold", True),
        ("prefetch_timeout_base", -1),
        ("prefetch_timeout_per_ki_token", "0.1"),
        ("prefetch_timeout_max", float("inf")),
        ("prefetch_timeout_max", None),
    ],
)
def test_a_wrong_setting_of_prefetching_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}=.* is not allowed: give a"):
        PrefetchSettings.split({name: value})


def test_a_store_is_opened_by_its_kind_and_guarded(tmp_path):
    store = open_store("file", {"path": str(tmp_path), "min_free_space": 0, "max_size": "1MiB", "deadline": 3}, "m")
    assert store.put([bytes(32)], [memoryview(b"image")]) == [True]
    assert store.stats()["put"].hits == 1
    store.close()
    reader = open_store("file", {"path": str(tmp_path), "read_only": True}, "m")
    assert reader.has([bytes(32)]) == [True]
    reader.close()


@pytest.mark.parametrize(
    ("backend", "extra", "said"),
    [
        ("flie", {}, "hicache_storage_backend='flie' is not there: choose from file"),
        ("file", {}, "path=None is not allowed"),
        ("file", {"path": "x", "deadline": 0}, "deadline=0 is not allowed: give a number above 0"),
        ("file", {"path": "x", "prefetch_threshold": 1}, "no setting prefetch_threshold"),
    ],
)
def test_what_cannot_be_opened_says_why(backend, extra, said):
    with pytest.raises(ConfigError, match=said):
        open_store(backend, extra, "")
