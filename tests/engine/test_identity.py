"""Whose a request is and what pages are called: namespaces that no two inputs share, names, what an abort ends."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rootcellar
from checkpoints import make_checkpoint
from rootcellar.cache import Key, digests
from rootcellar.config import EngineConfig
from rootcellar.engine import identity
from rootcellar.engine.identity import LONGEST_NAME, check_name, namespace, read_namespace, tenant_in
from rootcellar.errors import ConfigError, RequestError, RequestTooLarge
from rootcellar.models.config import load_config
from rootcellar.models.kinds import kinds_of
from rootcellar.models.loader import load_params

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
    held = begin(paused, n=2, rid="a")  # a stream that nobody holds ends
    for options in ({"rid": "a"}, {"rid": "a-0"}, {"rid": "a", "n": 2}, {"rid": "a", "prompts": 2}):
        with pytest.raises(RequestError, match="in use"):
            begin(paused, **options)
    for rids in (["b", "b"], ["b", "b-0"], ["b-1", "b"]):
        with pytest.raises(RequestError, match="in use"):
            begin(paused, prompts=2, n=2, rid=rids)
    assert paused.stats()["waiting"] == 2
    begin(paused, rid="b")  # what was refused left nothing behind
    held.close()


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


# --- what pages are called --------------------------------------------------------------------------------------------

PROMPT = list(range(40, 80))


def test_names_of_pages_are_a_format():
    """Written down for ever: whoever changes one of these changes ``FORMAT`` too."""
    key = Key(range(8), f"{identity.weights_named('mine')}/{identity.namespace('t', 's', 'x')}")
    assert key.namespace == (
        "named-3fd30542fe3f61b14bd4a4b2dc0b6fb30fa6f63ebce52dd1778aaa8c4dc02cff/tenant=t&cache_salt=s&extra_key=x"
    )
    assert [digest.hex() for digest in digests(key, 4, bytes(32))] == [
        "d649791b23fd8ac9b124c1d0a40cd1df37972ab545d07dc25acc3ee4d9b6afd4",
        "78f5755f0e45bcd69feb90e70b1d5be2b4db435ac6394780a5ca113156185397",
    ]


def test_weights_in_files_are_their_content_whatever_their_path(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, content in ((one, b"abc"), (two, b"abc")):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content)
    memory = tmp_path / "weights.json"
    files = [one / "model.safetensors"]
    name = identity.weights_in_files(files, memory)
    assert name == identity.weights_in_files([two / "model.safetensors"], None)
    assert name == identity.weights_in_files(files, memory), "remembered"
    files[0].write_bytes(b"abd")
    assert name != identity.weights_in_files(files, memory)
    other = two / "other.safetensors"
    other.write_bytes(b"abc")
    assert name != identity.weights_in_files([other], None)
    memory.write_text("no JSON")
    files[0].write_bytes(b"abc")
    assert name == identity.weights_in_files(files, memory)
    assert identity.weights_in_files(files, files[0] / "no") == name, "a memory that fails is no error"


def test_weights_without_a_name_are_one_runs_and_one_updates():
    code = "from rootcellar.engine import identity; print(identity.weights_of_this_run())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert len({other, str(identity.weights_of_this_run()), str(identity.weights_of_this_run())}) == 3


def test_a_name_is_for_weights_that_are_given(tiny_folder):
    with pytest.raises(ConfigError, match="weights_name is for params"):
        rootcellar.Engine(model_path=tiny_folder, weights_name="x")


def test_a_fingerprint_tells_apart_whatever_changes_a_pages_bytes(tiny_folder):
    model = load_config(tiny_folder)
    kinds, _ = kinds_of(model, "float32", 16)
    plain = identity.fingerprint(model, kinds, "float32", "float32", 16)
    assert plain == identity.fingerprint(
        replace(model, eos_token_ids=(7,), dtype="bfloat16"), kinds, "float32", "float32", 16
    )
    others = [
        identity.fingerprint(replace(model, embed_scale=2.0), kinds, "float32", "float32", 16),
        identity.fingerprint(model, kinds, "bfloat16", "float32", 16),
        identity.fingerprint(model, kinds, "float32", "bfloat16", 16),
        identity.fingerprint(model, kinds, "float32", "float32", 32),
    ]
    assert len({plain, *others}) == 5


def test_engines_with_the_same_files_share_all_names_and_with_other_weights_none(tiny_folder, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(tiny_folder, same)
    make_checkpoint("qwen2", other, tokenizer=True, seed=7)
    settings = {"max_total_tokens": 256, "max_running_requests": 1, "chunked_prefill_size": 32}
    names = {}
    for folder in (tiny_folder, same, other):
        with rootcellar.Engine(model_path=folder, **settings) as engine:
            names[folder] = engine.prefixes.names(PROMPT)
            if folder == tiny_folder:
                assert names[folder] != engine.prefixes.names(PROMPT, "x")
                tensors = load_params(folder, load_config(folder), np.float32)
                live = [engine.update_weights(tensors) and engine.prefixes.names(PROMPT) for _ in "ab"]
                named = [
                    engine.update_weights(tensors, "1", weights_name=name) and engine.prefixes.names(PROMPT)
                    for name in "xyx"
                ]
                engine.update_weights_from_disk(str(same))
                assert engine.prefixes.names(PROMPT) == names[folder]
    assert len(names[tiny_folder]) == len(PROMPT) // 16
    assert names[tiny_folder] == names[same]
    assert named[0] == named[2]
    for one, two in itertools.combinations([names[tiny_folder], names[other], *live, *named[:2]], 2):
        assert not set(one) & set(two)
