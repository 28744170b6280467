"""Whose a request is: namespaces that no two inputs share, names, and what ends when one is aborted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootcellar.config import EngineConfig
from rootcellar.engine.identity import LONGEST_NAME, check_name, namespace, read_namespace, tenant_in
from rootcellar.errors import RequestError, RequestTooLarge

GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
FIELDS = ("tenant", "salt", "extra_key")
# Any text at all, and pieces of what namespaces are made of: what would collide is made of those.
TEXT = st.one_of(
    st.text(st.characters(codec=None), max_size=6),
    st.lists(
        st.sampled_from(["a", "&", "=", "%", "%26", "/", "tenant=", "cache_salt=", "extra_key=", '["s","x"]', "+"]),
        max_size=4,
    ).map("".join),
)  # fmt: skip


@given(st.tuples(TEXT, TEXT, TEXT), st.tuples(TEXT, TEXT, TEXT), TEXT, TEXT)
def test_no_two_inputs_share_a_namespace(one, other, version, another):
    """Nor two with the weights' versions in front of them, as cache keys have it."""
    assert (namespace(*one) == namespace(*other)) == (one == other)
    keys = f"{version}/{namespace(*one)}", f"{another}/{namespace(*other)}"
    assert (keys[0] == keys[1]) == ((version, one) == (another, other))
    assert tenant_in(keys[0]) == one[0]


@given(TEXT)
def test_a_field_moved_is_another_namespace(text):
    """The fault was of this kind: one field's text that reads like two fields."""
    made = {namespace(*(text if i == j else "" for j in range(3))) for i in range(3)}
    assert len(made) == (3 if text else 1)
    assert namespace("", "", namespace("", "s", "x")) != namespace("", "s", "x")


def test_namespaces_as_they_read():
    assert namespace("", "", "") == ""
    assert namespace("", "", "adapter") == "extra_key=adapter"
    assert namespace("alice", "s&t", "a/b") == "tenant=alice&cache_salt=s%26t&extra_key=a%2Fb"
    shared = EngineConfig(share_cache_across_keys=True)
    assert read_namespace(shared, "alice", "s", "x") == namespace("", "s", "x")
    assert read_namespace(EngineConfig(), "alice", "s", "x") == namespace("alice", "s", "x")


def hits(engine, **where):
    return engine.generate(input_ids=list(range(5, 45)), sampling_params=GREEDY, **where)["meta_info"]["cached_tokens"]


def test_what_was_cached_for_others_is_no_hit(engine):
    """Each of these was computed once by itself; only the very same fields hit."""
    ways = [
        {},
        {"cache_salt": "s", "extra_key": "x"},
        {"extra_key": '["s","x"]'},
        {"extra_key": "cache_salt=s&extra_key=x"},
        {"tenant": "s", "extra_key": "x"},
        {"extra_key": "x"},
        {"cache_salt": "x"},
        {"tenant": "x"},
    ]
    engine.flush_cache()
    assert [hits(engine, **way) for way in ways] == [0] * len(ways)
    assert min(hits(engine, **way) for way in ways) > 0


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x" * (LONGEST_NAME + 1), "a\nb", "\0", "\ud800", 3, b"x", None])
@pytest.mark.parametrize("field", ["rid", "extra_key", "cache_salt", "tenant"])
def test_names_that_are_none(engine, field, value):
    if (field, value) == ("rid", None):
        return  # it may be left out
    with pytest.raises(RequestError, match=field):
        engine.generate(prompt="a", sampling_params=GREEDY, **{field: value})
    with pytest.raises(RequestError, match=field):
        check_name(field, value)


def test_the_longest_names_are_taken(engine):
    longest = "x" * LONGEST_NAME
    found = engine.generate(prompt="a", sampling_params=GREEDY, rid=longest, extra_key=longest, cache_salt=longest)
    assert found["meta_info"]["id"] == longest


@pytest.fixture
def paused(engine):
    """Nothing is computed, so that whatever begins is still there; afterwards all goes on."""
    engine.pause_generation()
    yield engine
    engine.abort_all()
    engine.continue_generation()


def begin(engine, prompts=1, n=1, **options):
    """Start a call and leave it waiting; its stream."""
    return engine.generate(
        prompt=["hello"] * prompts if prompts > 1 else "hello",
        stream=True,
        sampling_params={**GREEDY, "n": n},
        **options,
    )


def ended(stream):
    return [r["meta_info"]["id"] for r in stream if r["meta_info"]["finish_reason"]["type"] == "abort"]


def test_an_abort_ends_the_answers_of_that_call_and_of_no_other(paused):
    others = [begin(paused, rid=name) for name in ("user-1", "user-2", "user-x", "use", "user-10-1")]
    mine = begin(paused, rid="user")
    assert paused.abort_request("user") == 1
    assert ended(mine) == ["user"]
    assert paused.stats()["waiting"] == len(others)
    assert paused.abort_request("user") == 0
    assert paused.abort_request("user-1") == 1
    assert ended(others[0]) == ["user-1"]


def test_an_abort_ends_all_answers_of_a_call_or_of_one_of_its_prompts(paused):
    call = begin(paused, prompts=3, n=2, rid="c")
    alone = begin(paused, n=2, rid="a")
    several = begin(paused, prompts=2, n=2, rid=["p", "q"])
    assert paused.abort_request("c-1") == 2
    assert paused.abort_request("c-0-1") == 1
    assert paused.abort_request("c") == 3
    assert sorted(ended(call)) == [f"c-{i}-{j}" for i in range(3) for j in range(2)]
    assert paused.abort_request("a") == 2
    assert ended(alone) == ["a-0", "a-1"]
    assert paused.abort_request("q") == 2
    assert paused.abort_request("p-0") == 1
    assert paused.stats()["waiting"] == 1
    paused.abort_all()
    assert len(ended(several)) == 4


def test_a_name_stands_for_one_thing(paused):
    begin(paused, n=2, rid="a")
    for options in ({"rid": "a"}, {"rid": "a-0"}, {"rid": "a", "n": 2}, {"rid": "a", "prompts": 2}):
        with pytest.raises(RequestError, match="in use"):
            begin(paused, **options)
    for rids in (["b", "b"], ["b", "b-0"], ["b-1", "b"]):
        with pytest.raises(RequestError, match="in use"):
            begin(paused, prompts=2, n=2, rid=rids)
    assert paused.stats()["waiting"] == 2
    begin(paused, rid="b")  # what was refused left nothing behind


def test_tenants_may_use_the_same_names(paused):
    of = {tenant: begin(paused, rid="same", tenant=tenant) for tenant in ("", "alice", "bob")}
    assert paused.abort_request("same", "alice") == 1
    assert paused.abort_request("same", "alice") == 0
    assert paused.abort_request("same", "carol") == 0
    assert ended(of["alice"]) == ["same"]
    assert paused.abort_request("same") == 2  # whoever names no tenant means all


# -- pins -------------------------------------------------------------------------------------------------------------


def test_pins_are_a_tenants_own(engine):
    engine.flush_cache()
    ids = list(range(5, 45))
    for tenant in ("alice", "bob"):
        engine.generate(input_ids=ids, sampling_params=GREEDY, tenant=tenant)
        pinned = engine.prefixes.pin(ids, 60, tenant=tenant)
        assert pinned["pinned_tokens"] > 0
        assert pinned["pins"] == 1
    assert not engine.prefixes.unpin(ids)
    assert engine.prefixes.unpin(ids, tenant="bob")
    assert not engine.prefixes.unpin(ids, tenant="bob")
    engine.prefixes.pin(ids, 60, tenant="alice", share=0.5)
    with pytest.raises(RequestTooLarge, match="may hold"):
        engine.prefixes.pin(ids, 60, tenant="alice", share=0.01)
    assert engine.prefixes.unpin(ids, tenant="alice")


def test_an_explanation_names_no_other_tenant(engine):
    engine.flush_cache()
    ids = list(range(5, 45))
    engine.generate(input_ids=ids, sampling_params=GREEDY, tenant="alice")
    told = engine.prefixes.explain(ids, tenant="bob", others=False)
    assert told["elsewhere"] is None
    assert "alice" not in str(told)
    assert "alice" in engine.prefixes.explain(ids, tenant="bob")["elsewhere"]
    assert engine.prefixes.explain(ids, "x", tenant="alice", others=False)["elsewhere"].endswith("tenant=alice")
