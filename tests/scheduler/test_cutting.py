"""Whatever shares, pages, tiles and snapshots say, no chunk ends inside an atomic span, and all are computed."""

import random
from functools import partial

import numpy as np
import pytest

from rootcellar.media.picture import digest_of
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import Request, Snapshots, Span
from rootcellar.scheduler.cutting import Cutter
from rootcellar.scheduler.placeholders import outside, placeholder_ids

NOTHING = np.zeros((1, 1, 3), np.uint8)


def request(name, length, spans, tenant):
    made = Request.new(name, np.arange(length), SamplingParams(max_new_tokens=1), tenant=tenant)
    made.spans = tuple(Span(start, stop, start.to_bytes(2), NOTHING, 0, atomic) for start, stop, atomic in spans)
    return made


def draw(rng, i, longest):
    """A request with up to three spans of up to ``longest`` tokens, or, where they may be cut, of more; they may touch,
    begin it or end it.
    """
    at, spans = rng.randrange(8), []
    for _ in range(rng.randrange(4)):
        atomic = rng.random() < 0.7
        stop = at + rng.randint(1, longest if atomic else 3 * longest)
        spans.append((at, stop, atomic))
        at = stop + rng.choice([0, 1, 5, 30])
    return request(f"r{i}", max(at, 1) + rng.choice([0, 1, 40]), spans, f"tenant {rng.randrange(3)}")


def is_there(late, _, span):
    return span not in late


@pytest.mark.parametrize("seed", range(3))
def test_every_span_is_computed_in_the_end_and_atomic_ones_in_one_chunk(seed):
    rng = random.Random(seed)
    for _ in range(150):
        chunk, page = rng.choice([16, 48, 64]), rng.choice([1, 4, 16])
        snapshots = Snapshots(page, rng.choice([8, 32])) if rng.random() < 0.3 else None
        requests = [draw(rng, i, chunk) for i in range(rng.randint(1, 4))]
        late = {span for r in requests for span in r.spans if rng.random() < 0.5}  # whose vectors are not there yet
        cutter = Cutter(chunk, -(-chunk // 16), lambda n: -(-n // 16), page, snapshots, partial(is_there, late))
        for turn in range(2000):
            left = [r for r in requests if r.remaining]
            if not left:
                break
            counts = cutter.counts(cutter.able(left), turn)
            assert counts or late, f"seed {seed}: nothing goes on"
            assert sum(-(-n // 16) for n in counts.values()) <= cutter.tiles
            for each, n in counts.items():
                start, stop = each.computed, each.computed + n
                assert 0 < n <= each.remaining
                assert outside(each.spans, stop) == stop, f"seed {seed}: an atomic span is cut"
                assert not any(span in late for span in each.spans if start < span.stop and span.start < stop)
                each.computed = stop
            if late and rng.random() < 0.3:
                late.pop()
        assert not any(r.remaining for r in requests), f"seed {seed}: somebody is never computed"


def test_two_pictures_have_no_id_in_common_be_they_one_pixel_apart():
    rng = np.random.default_rng(7)
    seen = set()
    for _ in range(2_000):
        one = rng.integers(0, 256, (3, 4, 3), np.uint8)
        other = one.copy()
        other[tuple(rng.integers(0, one.shape))] ^= np.uint8(1 << rng.integers(8))
        seen |= set(np.concatenate([placeholder_ids(digest_of(each), 4) for each in (one, other)]).tolist())
    assert len(seen) == 2_000 * 2 * 4
