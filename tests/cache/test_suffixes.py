"""The index of text by what stands before: against brute force, and both of its kinds against each other."""

import random

import numpy as np
import pytest

from rootcellar.cache import CORE, Suffixes, owner_of
from rootcellar.cache.suffixes import ANCHOR, BLOCK, PySuffixes

KINDS = [PySuffixes, *([Suffixes] if CORE == "native" else [])]
OWNERS = [owner_of(name) for name in ("", "a", "b")]


def text(tokens):
    return np.asarray(tokens, np.int64)


class Brute:
    """All places, one after the other, the newest first."""

    def __init__(self, capacity, longest):
        self._room, self._longest = capacity // BLOCK, longest
        self._blocks = []  # (owner, tokens with -1 behind the last), newest last

    def add(self, owner, tokens):
        tokens = [*tokens[-(self._room * BLOCK - 1) :].tolist(), -1]
        for at in range(0, len(tokens), BLOCK):
            part = tokens[at : at + BLOCK]
            self._blocks.append((owner, part + [-1] * (BLOCK - len(part))))
        del self._blocks[: -self._room]

    def find(self, owner, tokens, most):
        ring = [token for _, block in self._blocks for token in block]
        asked = tokens[-self._longest :].tolist()
        best = 0, None
        for end in range(len(ring) - 2, ANCHOR - 2, -1):
            if ring[end + 1] == -1 or self._blocks[end // BLOCK][0] != owner:
                continue
            matched = 0
            while matched < len(asked) and matched <= end and ring[end - matched] == asked[-1 - matched]:
                matched += 1
            if matched >= ANCHOR and matched > best[0]:
                best = matched, end
        if best[1] is None:
            return 0, ()
        said = ring[best[1] + 1 :][:most]
        return best[0], tuple(said[: said.index(-1)] if -1 in said else said)


def session(seed, everybody, rounds=60):
    """Additions and questions at random; everybody must say the same."""
    rng = random.Random(seed)
    letters = rng.choice([2, 3, 8])
    asked = 0
    for _ in range(rounds):
        owner = rng.choice(OWNERS)
        tokens = text([rng.randrange(letters) for _ in range(rng.choice([0, 1, 3, 5, 20, 63, 64, 65, 150]))])
        if rng.random() < 0.3:
            for each in everybody:
                each.add(owner, tokens)
        else:
            most = rng.choice([0, 1, 7])
            answers = [each.find(owner, tokens, most) for each in everybody]
            assert all(answer == answers[0] for answer in answers), (seed, answers)
            asked += answers[0][0] > 0
    return asked


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_places_and_what_followed_are_those_of_brute_force(kind):
    found = 0
    for seed in range(40):
        capacity, longest = BLOCK * (1 + seed % 7), 4 + seed % 9
        found += session(seed, [kind(capacity, longest, 10**6), Brute(capacity, longest)])
    assert found > 100


@pytest.mark.skipif(CORE != "native", reason="the native core was not built, or is not wanted")
def test_both_kinds_try_the_same_places():
    for seed in range(60):
        capacity, longest, tries = BLOCK * (1 + seed % 5), 4 + seed % 9, 1 + seed % 4
        session(seed, [kind(capacity, longest, tries) for kind in KINDS])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_nobody_is_told_of_anothers_text(kind):
    index = kind(1000, 8, 8)
    index.add(OWNERS[1], text(range(100)))
    assert index.find(OWNERS[1], text([4, 5, 6, 7]), 3) == (4, (8, 9, 10))
    assert index.find(OWNERS[2], text([4, 5, 6, 7]), 3) == (0, ())
    index.add(OWNERS[2], text([4, 5, 6, 7, 99, 98]))
    assert index.find(OWNERS[2], text([4, 5, 6, 7]), 3) == (4, (99, 98))
    assert index.find(OWNERS[1], text([4, 5, 6, 7]), 3) == (4, (8, 9, 10))
    index.clear()
    assert all(index.find(owner, text([4, 5, 6, 7]), 3) == (0, ()) for owner in OWNERS)
    index.add(OWNERS[1], text(range(20)))
    assert index.find(OWNERS[1], text([4, 5, 6, 7]), 3) == (4, (8, 9, 10))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_no_token_of_a_text_is_not_kept(kind):
    index = kind(1000, 8, 8)
    index.add(OWNERS[0], text([1, 2, 3, 4, 1 << 40, 6]))
    assert index.find(OWNERS[0], text([1, 2, 3, 4]), 3) == (0, ())
    assert index.find(OWNERS[0], text([1, 2, 3, 1 << 40]), 3) == (0, ())
    assert index.find(OWNERS[0], text([-1, -1, -1, -1]), 3) == (0, ())


@pytest.mark.skipif(CORE != "native", reason="the native core was not built, or is not wanted")
def test_text_takes_few_bytes_when_its_ring_was_written_over():
    """The bar is 20 bytes a token, at a million tokens. What a question takes: ``benchmarks/suffix_index.py``."""
    index, rng = Suffixes(1_000_000, 24, 32), np.random.default_rng(0)
    said = rng.integers(0, 1000, 20_000)
    for _ in range(80):
        at, cut = rng.integers(0, 8_000, 2)
        index.add(OWNERS[0], np.concatenate([said[at:], rng.integers(0, 1000, cut)]))
    assert index.memory_bytes() < 13 * 1_000_000
    asked = [said[at - 24 : at] for at in rng.integers(10_000, 19_000, 500)]
    assert all(index.find(OWNERS[0], tokens, 15)[0] == 24 for tokens in asked)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_index_that_is_full_grows_no_more(kind):
    index, rng = kind(1000, 8, 8), np.random.default_rng(0)

    def added():
        for _ in range(20):
            index.add(OWNERS[0], rng.integers(0, 1 << 20, 100))
        return index.memory_bytes()

    full = added()
    assert added() <= full
