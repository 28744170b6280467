"""What is said once: the verbs in ``api.py``, the errors in ``words.py``, the settings in ``settings.py``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import CORES, make, start, tokens

import rootcellar.cache
from rootcellar.cache import Key, Tier, full, recurrent
from rootcellar.cache.api import PrefixCache
from rootcellar.cache.order import POLICIES
from rootcellar.cache.settings import Settings

VERBS = [name for name, verb in vars(PrefixCache).items() if callable(verb) and not name.startswith("_")]


def parameters(verb) -> list[tuple[str, object, object]]:
    """Names, kinds and defaults of a verb's parameters but ``self``."""
    text = getattr(verb, "__nb_signature__", None)
    if text is not None:  # nanobind's own description: 'def f(self, a: T, b: T = \0, *, c: T = \1) -> R', and defaults
        ((declared, _, defaults),) = text
        arguments = re.sub(r"\\(\d+)", r"DEFAULTS[\1]", declared).removeprefix("def ")
        scope: dict = {"DEFAULTS": defaults or ()}
        exec(f"from __future__ import annotations\ndef {arguments}: ...", scope)
        verb = scope[arguments.split("(")[0]]
    return [(p.name, p.kind, p.default) for p in inspect.signature(verb).parameters.values()][1:]


@pytest.mark.parametrize("core", CORES)
def test_each_core_has_the_verbs_of_the_api_and_no_others(core):
    public = {name for name in dir(CORES[core]) if not name.startswith("_") and name.islower()}
    assert public - {"kinds", "page_size", "tables"} == {*VERBS, "tick"}
    for name in VERBS:
        verb = getattr(CORES[core], name)
        assert parameters(verb) == parameters(getattr(PrefixCache, name)), name


@pytest.mark.parametrize("core", CORES)
def test_what_a_core_says_of_its_verbs_in_python_is_the_api(core):
    for name in VERBS:
        verb = vars(CORES[core]).get(name)
        if inspect.isfunction(verb):
            assert inspect.getdoc(getattr(CORES[core], name)) == inspect.getdoc(getattr(PrefixCache, name)), name


def refusals():
    """One call for each error that a verb raises: what to call on a cache with an open lease."""
    key = Key(tokens((0, 8)))
    return {
        "key_too_long": lambda cache, _: cache.open(cache.match(Key(np.arange(65)))),
        "gives_too_much": lambda cache, lease: cache.grow(lease, -1),
        "row_full": lambda cache, lease: cache.grow(lease, 57),
        "commit_too_long": lambda cache, lease: cache.commit(lease, Key(np.arange(9))),
        "commit_elsewhere": lambda cache, lease: cache.commit(lease, Key(key.tokens, "lora")),
        "closed": lambda cache, lease: (cache.close(lease), cache.close(lease)),
        "flush": lambda cache, _: cache.flush(),
        "forget_tier": lambda cache, _: cache.forget_tier(Tier.DEVICE),
        "forget_tier_in_use": lambda cache, _: (cache.save(), cache.forget_tier(Tier.HOST)),
        "not_written": lambda cache, _: cache.write_to(Tier.STORAGE, True),
        "never_written": lambda cache, _: cache.write_to(Tier.DEVICE, False),
        "grow_uneven": lambda cache, lease: cache.grow_many([lease], [1, 1]),
        "commit_uneven": lambda cache, lease: cache.commit_many([lease], []),
        "no_paged_kind": lambda cache, _: cache.slots(cache.match(key), "state"),
        "no_shelf": lambda cache, _: cache.make_room("full", 1, Tier.PEER),
        "no_such_kind": lambda cache, _: cache.make_room("none", 1),
    }


@pytest.mark.skipif("native" not in CORES, reason="the native core was not built")
@pytest.mark.parametrize("name", refusals())
def test_both_cores_refuse_in_the_same_words(name, monkeypatch):
    import helpers

    said = []
    for core in CORES:
        monkeypatch.setattr(helpers, "core", core)
        cache = make((full("full"), recurrent("state")), tiers=(Tier.HOST,), max_length=64)
        lease = start(cache, tokens((0, 8)))
        with pytest.raises(Exception) as caught:  # noqa: PT011  # which one is compared
            refusals()[name](cache, lease)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]
    assert said[0][0].__module__ in ("builtins", "rootcellar.errors")


def test_settings_have_their_names_in_one_list():
    """C++ reads by name what Settings has, its policies are Python's, and no constructor has a list of its own."""
    header = (Path(rootcellar.cache.__file__).parent / "native" / "settings.h").read_text()
    names = re.findall(r"^    HAS\(.*, (\w+)\)", header, re.MULTILINE)
    given = Settings(kinds=(full("full"),), capacity={("full", Tier.DEVICE): 16})
    assert len(names) > 10
    assert all(hasattr(given, name) for name in names)
    (policies,) = re.findall(r"POLICIES\[\] = \{(.*)\}", header)
    assert re.findall(r'"(\w+)"', policies) == list(POLICIES)
    for core in CORES.values():
        with pytest.raises(TypeError, match="unexpected keyword argument 'pretend'"):
            core([full("full")], capacity=given.capacity, pretend=1)
