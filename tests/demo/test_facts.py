"""What the demo model is taught must be true of the settings, and unambiguous."""

import re
from pathlib import Path

import pytest

from rootcellar.config import EngineConfig
from rootcellar.demo import Fact, load_facts, manual

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def facts() -> dict[str, Fact]:
    return {fact.id: fact for fact in load_facts()}


@pytest.fixture
def corpus(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo_corpus

    return demo_corpus


def test_every_fact_is_whole(facts):
    assert len(facts) == len(load_facts()) >= 80
    for fact in facts.values():
        assert fact.type in {"concept", "knob", "verb", "other"}
        assert fact.terms
        assert fact.ask
        assert fact.held
        assert not set(fact.ask) & set(fact.held)
        for text in (fact.answer, fact.more):
            assert re.fullmatch(r"[A-Za-z].*[.]", text), text
            assert text.isascii()
            assert len(text) <= 170, "one or two short sentences"


@pytest.mark.parametrize(
    ("setting", "fact"),
    [
        ("page_size", "page_size"),
        ("chunked_prefill_size", "chunked_prefill_size"),
        ("radix_eviction_policy", "radix_eviction_policy"),
        ("schedule_policy", "lpm"),
        ("model_path", "model_path"),
        ("dtype", "dtype"),
    ],
)
def test_stated_defaults_are_the_settings_own(facts, setting, fact):
    text = facts[fact].answer + facts[fact].more
    assert re.search(rf"\b{getattr(EngineConfig(), setting)}\b", text)


def test_no_phrasing_asks_for_two_facts_or_is_both_trained_and_held_out(facts, corpus):
    def plain(question: str) -> str:
        return question.lower().rstrip("?.!")

    owner: dict[str, str] = {}
    for fact in facts.values():
        for question in corpus.questions(fact):
            assert owner.setdefault(plain(question), fact.id) == fact.id, question
    for fact in facts.values():
        for question in corpus.questions(fact, held=True):
            assert plain(question) not in owner, question


def test_one_seed_gives_one_corpus(facts, corpus):
    def draw(seed: int) -> list:
        writer = corpus.Writer(list(facts.values()), seed)
        return [writer.chat(lambda chat: len(chat) < 8) for _ in range(20)]

    assert draw(3) == draw(3) != draw(4)


def test_chats_alternate_and_fit(facts, corpus):
    writer = corpus.Writer(list(facts.values()), 0)
    for _ in range(50):
        chat = writer.chat(lambda chat: len(chat) <= 7, writer.long_system(), turns=8)
        assert [message["role"] for message in chat] == ["system", *["user", "assistant"] * 3][: len(chat)]


def test_manual_lists_the_facts_it_is_given(facts):
    chosen = [facts["page"], facts["lease"]]
    assert manual(chosen).splitlines()[2:] == [f"{fact.title}: {fact.answer}" for fact in chosen]
