"""The text the embedded demo model is trained on: chats about the facts in ``src/rootcellar/demo/facts.toml``.

How people ask is in ``demo_phrases.toml``, so that more ways can be added without touching code.

Everything is drawn from a ``random.Random``, so one seed gives one corpus. A chat is a list of messages with the keys
``role`` and ``content``, as a chat template takes them. Nothing here needs JAX or a tokenizer.

    python scripts/demo_corpus.py        # print a few chats
"""

import random
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rootcellar.demo import Fact, load_facts, manual

Chat = list[dict[str, str]]

with open(Path(__file__).parent / "demo_phrases.toml", "rb") as _file:
    PHRASES: dict[str, Any] = tomllib.load(_file)
FALLBACK: str = PHRASES["off_topic"]["answer"]


def off_topic_nouns() -> tuple[list[str], list[str]]:
    """Return the nouns of off-topic questions: those trained on, and every seventh, held out."""
    nouns: list[str] = PHRASES["off_topic"]["nouns"]
    return [noun for i, noun in enumerate(nouns) if i % 7 != 3], nouns[3::7]


def all_terms(fact: Fact) -> list[str]:
    """Return how a fact's subject may be written: its terms, and a setting's command-line and spoken spellings."""
    terms = list(fact.terms)
    if fact.type == "knob":
        names = [term for term in fact.terms if "_" in term and "(" not in term and " " not in term]
        terms += ["--" + name.replace("_", "-") for name in names] + [name.replace("_", " ") for name in names]
    return list(dict.fromkeys(terms))


def _fill(template: str, term: str) -> str:
    plural = term.endswith("s") and not any(c in term for c in "_-") and term not in {"fcfs", "stats"}
    text = template.format(t=term, **{"is": "are" if plural else "is", "do": "do" if plural else "does"})
    return text[0].upper() + text[1:] if text.startswith(("a ", "the ")) else text


def questions(fact: Fact, held: bool = False) -> list[str]:
    """Return every phrasing of a fact's question: the trained ones, or those kept out of training."""
    templates = PHRASES[fact.type]["held" if held else "trained"]
    whole = fact.held if held else fact.ask
    terms = all_terms(fact)[:2] if held else all_terms(fact)
    return list(dict.fromkeys([*whole, *(_fill(template, term) for template in templates for term in terms)]))


def _nonsense(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))


def _misspell(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text))
    if not text[at].isalpha():
        return text
    return text[:at] + rng.choice(["", text[at] * 2, rng.choice("abcdefghijklmnopqrstuvwxyz")]) + text[at + 1 :]


def _vary(rng: random.Random, text: str) -> str:
    """Write a question as people do: in lower case, without its mark, with an opening word, with a slip."""
    if rng.random() < 0.10:
        text = rng.choice(PHRASES["around"]["openers"]) + text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    if rng.random() < 0.05:
        text = _misspell(rng, text)
    return text or "?"


class Writer:
    """Draws chats about a list of facts."""

    def __init__(self, facts: Sequence[Fact], seed: int) -> None:
        self.rng = random.Random(seed)
        self.facts = list(facts)
        self.nouns = off_topic_nouns()[0]
        self.trained = {fact.id: self._weighted_questions(fact) for fact in facts}

    @staticmethod
    def _weighted_questions(fact: Fact) -> tuple[list[str], list[str]]:
        templated = [q for q in questions(fact) if q not in fact.ask]
        return list(fact.ask), templated or list(fact.ask)

    def ask(self, fact: Fact) -> str:
        """Return a trained phrasing of a fact's question, whole questions and templates equally often."""
        whole, templated = self.trained[fact.id]
        return _vary(self.rng, self.rng.choice(whole if self.rng.random() < 0.5 else templated))

    def off_topic(self) -> str:
        """Return a question that the model must decline."""
        rng = self.rng
        if rng.random() < 0.15:
            return _vary(rng, rng.choice(PHRASES["off_topic"]["whole"]))
        x = _nonsense(rng) if rng.random() < 0.15 else rng.choice(self.nouns)
        text = rng.choice(PHRASES["off_topic"]["trained"]).format(x=x, y=rng.choice(self.nouns))
        return _vary(rng, text[0].upper() + text[1:])

    def _next_turn(self, last: Fact | None, said_more: bool) -> tuple[str, str, Fact | None, bool]:
        rng, draw = self.rng, self.rng.random()
        if draw < 0.14:
            return self.off_topic(), FALLBACK, None, False
        if draw < 0.20:
            talk = rng.choice(list(PHRASES["small_talk"].values()))
            return _vary(rng, rng.choice(talk["trained"])), talk["answer"], None, False
        if draw < 0.46:
            more = PHRASES["more"]
            answer = more["about_what"] if last is None else more["all_i_know"] if said_more else last.more
            return _vary(rng, rng.choice(more["trained"])), answer, last, last is not None
        fact = rng.choice(self.facts)
        if draw < 0.55:
            asked = _fill(rng.choice(PHRASES["more_about"]["trained"]), rng.choice(fact.terms))
            return _vary(rng, asked), fact.more, fact, True
        if draw < 0.67 and fact.type != "other":
            asked = _fill(rng.choice(PHRASES["and"]["trained"]), rng.choice(all_terms(fact)))
            return _vary(rng, asked), fact.answer, fact, False
        return self.ask(fact), fact.answer, fact, False

    def _system(self) -> str | None:
        rng, draw = self.rng, self.rng.random()
        if draw < 0.70:
            return None
        if draw < 0.85:
            return rng.choice(PHRASES["around"]["system"])
        return manual(rng.sample(self.facts, rng.randint(1, 3)))

    def chat(self, fits: Callable[[Chat], bool], system: str | None = None, turns: int | None = None) -> Chat:
        """Return one chat of at most `turns` turns (by default one to three), as long as `fits` accepts it."""
        rng = self.rng
        turns = turns or rng.choice([1, 2, 2, 3])
        system = self._system() if system is None else system
        chat: Chat = [] if system is None else [{"role": "system", "content": system}]
        last, said_more = None, False
        for turn in range(turns):
            if turn == 0 and rng.random() < 0.75:
                last = rng.choice(self.facts)
                asked, answer = self.ask(last), last.answer
            else:
                asked, answer, last, said_more = self._next_turn(last, said_more)
            longer = [*chat, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            if not fits(longer):
                break
            chat = longer
        return chat

    def long_system(self) -> str:
        """Return a manual of 15 to 36 facts in random order, as the demo sends one."""
        rng = self.rng
        chosen = rng.sample(self.facts, rng.randint(15, 36))
        return manual(chosen) if rng.random() < 0.7 else manual(chosen, rng.choice(PHRASES["around"]["manual_heads"]))


def held_out_off_topic(rng: random.Random, count: int) -> list[str]:
    """Return off-topic questions with nouns and templates that were never trained on."""
    nouns = off_topic_nouns()[1]
    phrases = PHRASES["off_topic"]
    drawn = [rng.choice(phrases["held"] + phrases["trained"][:8]).format(x=rng.choice(nouns)) for _ in range(count)]
    return list(dict.fromkeys([*phrases["whole_held"], *(text[0].upper() + text[1:] for text in drawn)]))


if __name__ == "__main__":
    writer = Writer(load_facts(), seed=0)
    for _ in range(8):
        for message in writer.chat(lambda chat: len(str(chat)) < 1200):
            print(f"{message['role']:>9}: {message['content']}")
        print()
