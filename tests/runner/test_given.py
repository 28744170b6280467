"""What is no token: ids above the vocabulary with vectors of their own, through cache, batch, step and sampler."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import make_config
from rootcellar.cache import Key, RadixCache, Tier
from rootcellar.errors import EngineError
from rootcellar.models.config import read_config
from rootcellar.models.kinds import paging
from rootcellar.models.params import init_params
from rootcellar.runner import Batch, BatchPart, Placement, Programs, Runner, Shapes, Vectors, pools_of
from rootcellar.runner.sampler import Sampled
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler.placeholders import placeholder_ids

PAGE, PAGES, WIDTH = 4, 64, 16
AT = np.arange(6, 15)  # where a prompt of 24 has an image
LENGTH = 24


@pytest.fixture(scope="module")
def runner():
    cfg = read_config(make_config("gemma3", num_hidden_layers=1))  # its embeddings of tokens are scaled
    placement, pages = Placement(cfg), paging(cfg, "float32", PAGE, arena=False)
    programs = Programs(placement, np.dtype(np.float32), pages, "xla", Shapes(16, 2, 1), WIDTH, 0)
    pools = pools_of(pages, placement, {kind.name: PAGES for kind in pages.kinds})
    return Runner(programs, placement.place(init_params(cfg, 0, np.float32)), pools)


@pytest.fixture
def cache(runner):
    kinds = runner.programs.paging.kinds
    capacity = {(kind.name, Tier.DEVICE): PAGES * PAGE for kind in kinds}
    return RadixCache(kinds, page_size=PAGE, capacity=capacity, max_leases=2, max_length=WIDTH * PAGE)


def run(runner, cache, ids, vectors):
    """Compute a prompt as far as it is not cached: how much was cached, and the logits of its last token."""
    hit = cache.match(Key(ids[:-1]))
    lease = cache.open(hit)
    start = hit.reach(Tier.DEVICE)
    assert cache.grow(lease, len(ids) - start)
    where = np.flatnonzero(np.isin(AT, np.arange(start, len(ids))))
    given = Vectors(AT[where] - start, vectors[where]) if vectors is not None and len(where) else None
    tables = {kind.name: cache.tables[kind.name] for kind in runner.programs.paging.kinds}
    scores, _ = runner.step(Batch.build([BatchPart(lease.row, start, ids[start:], given)], tables, 16))
    cache.commit(lease, Key(ids))
    cache.close(lease)
    return start, np.asarray(scores[0])


def prompt(content):
    """Token ids with an image of this content at ``AT``."""
    ids = np.arange(100, 100 + LENGTH)
    ids[AT] = placeholder_ids(hashlib.sha256(content).digest(), len(AT))
    return ids


def test_placeholders_follow_from_content_and_position():
    one, other = placeholder_ids(b"a cat", 500), placeholder_ids(b"a dog", 500)
    assert one.dtype == np.int64
    assert min(one) >= 1 << 62
    assert len({*one.tolist(), *other.tolist()}) == 1000
    np.testing.assert_array_equal(placeholder_ids(b"a cat", 7), one[:7])


def test_vectors_stand_for_what_is_no_token_and_are_cached_by_its_content(runner, cache):
    cfg = runner.placement.served
    rng = np.random.default_rng(3)
    cat, dog = (rng.standard_normal((len(AT), cfg.hidden_size)).astype(np.float32) for _ in range(2))
    cached, first = run(runner, cache, prompt(b"cat"), cat)
    assert cached == 0
    cached, again = run(runner, cache, prompt(b"cat"), cat)
    assert cached == 20  # whole pages, the image's among them
    np.testing.assert_allclose(again, first, atol=2e-5)
    # Another image: only the page before it is shared, and the answer is another.
    cached, other = run(runner, cache, prompt(b"dog"), dog)
    assert cached == 4
    assert np.abs(other - first).max() > 1e-2
    cached, once_more = run(runner, cache, prompt(b"dog"), dog)
    assert cached == 20
    np.testing.assert_allclose(once_more, other, atol=2e-5)
    cache.check()


def test_ids_that_agree_in_their_low_32_bits_share_nothing(runner, cache):
    vectors = np.zeros((len(AT), runner.placement.served.hidden_size), np.float32)
    one = prompt(b"cat")
    other = one.copy()
    other[AT] = (1 << 61) | (one[AT] & 0xFFFFFFFF)
    run(runner, cache, one, vectors)
    assert run(runner, cache, other, vectors)[0] == 4


def test_the_embedding_of_a_token_given_as_a_vector_is_that_token(runner, cache):
    """Vectors enter behind the scaling that tokens' embeddings go through."""
    cfg = runner.placement.served
    ids = np.arange(100, 100 + LENGTH)
    _, expected = run(runner, cache, ids, None)
    vectors = np.asarray(runner.params["embed"])[ids[AT]] * np.float32(cfg.embed_scale)
    cached, found = run(runner, cache, prompt(b"words"), vectors)
    assert cached == 4
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_an_id_that_is_no_token_and_has_no_vector_is_an_error_and_not_another_token(runner):
    tables = {kind.name: np.zeros((2, WIDTH), np.int32) for kind in runner.programs.paging.kinds}
    for strange in (runner.placement.served.vocab_size, (1 << 32) + 5, -1):
        with pytest.raises(EngineError, match=f"token {strange} is not in the vocabulary"):
            runner.step(Batch.build([BatchPart(1, 0, np.array([5, strange]))], tables, 16))


def test_penalties_and_logprobs_pass_over_what_is_no_token(runner):
    vocab = runner.placement.served.vocab_size
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((1, vocab)), jnp.float32)
    best = int(scores[0].argmax())
    settings = SamplingParams(temperature=0, repetition_penalty=1.5, presence_penalty=0.5)
    none = np.zeros(0, np.int64)

    def choose(prompt):
        return int(runner.sample(scores, [Sampled(settings, 0, 0, (), prompt, none)]).read()[0].item())

    assert choose(placeholder_ids(b"cat", 9)) == best
    assert choose(np.array([best, *placeholder_ids(b"cat", 9), -3])) == choose(np.array([best])) != best
    hidden = jnp.ones((16, runner.placement.served.hidden_size))
    targets = np.array([7, placeholder_ids(b"cat", 1)[0], -1, *range(13)])
    chosen, _, _ = runner.score(hidden, targets, 0)
    assert np.isnan(chosen).tolist() == [False, True, True] + [False] * 13
