"""Pictures in prompts: the tokens and logprobs of transformers, whatever is cached, and each picture encoded once."""

import contextlib
import functools
import hashlib
import itertools
import json

import numpy as np
import pytest
from apart import two_nodes
from idle import always_load, check_idle, evict, settle

import rootcellar
from checkpoints import GOLDEN, PROCESSORS, golden_pictures, make_config, picture
from rootcellar.cache import Tier
from rootcellar.errors import RequestError, RequestTooLarge
from rootcellar.models.config import read_config
from rootcellar.models.encoders import parts

GREEDY = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}


QWEN25, QWEN35, GEMMA3 = MODELS = ("qwen2-5-vl", "qwen3-5", "gemma3-seeing")


@pytest.fixture(scope="module", autouse=True)
def many_parts():
    """Blocks that see a whole picture are cut into parts even of small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_ROWS", 32)
        yield


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """For each model its golden case and its folder, made when it is asked for."""

    @functools.cache
    def made(name):
        case, folder = golden_pictures(name), tmp_path_factory.mktemp(name)
        case.make(folder)
        return case, folder

    return made


@pytest.fixture(scope="module")
def case(cases):
    return cases(QWEN25)


@contextlib.contextmanager
def engine(folder, **options):
    options = {"max_total_tokens": 2048, "max_running_requests": 8, "skip_tokenizer_init": True, **options}
    with rootcellar.Engine(model_path=folder, **options) as made:
        yield made
        check_idle(made)


@pytest.fixture(scope="module")
def shared(case):
    """One engine for the tests that need no other, and its golden case."""
    with engine(case[1], page_size=4, chunked_prefill_size=64) as made:
        yield made, case[0]


def shown(case, i):
    return [picture(*each) for each in case.pictures[i]]


@pytest.mark.parametrize("name", MODELS)
def test_preprocessing_equals_transformers_bit_for_bit(name):
    config = make_config(name)
    encoder = read_config(config, processor=PROCESSORS.get(config["model_type"])).encoder
    for seed, height, width, digest in json.loads((GOLDEN / "pictures" / "pixels.json").read_text())[name]:
        values = encoder.pixel_values(encoder.prepare(picture(seed, height, width)))
        found = hashlib.sha256(np.ascontiguousarray(values, "<f4")).hexdigest()
        assert found == digest, f"{width} x {height} pixels"


def ask(engine, ids, images, **options):
    """The result, and how many pictures were encoded for it."""
    before = encoded(engine)
    result = engine.generate(
        input_ids=ids, image_data=images, sampling_params={**GREEDY, "max_new_tokens": 4}, **options
    )
    return result["meta_info"], encoded(engine) - before, result["output_ids"]


def encoded(engine):
    return engine.stats()["encoder"]["encoded"]


def check(case, results, at):
    for i, result in zip(at, results, strict=True):
        assert result["output_ids"] == case.tokens[i], f"prompt {i}"
        found = [value for value, _, _ in result["meta_info"]["input_token_logprobs"][1:]]
        assert [x is None for x in found] == [x is None for x in case.logprobs[i]]
        pairs = [(x, y) for x, y in zip(found, case.logprobs[i], strict=True) if y is not None]
        np.testing.assert_allclose(*zip(*pairs, strict=True), atol=2e-4, rtol=0)


TIERS = {"enable_hierarchical_cache": True, "hicache_ratio": 4.0}
LITTLE = {"max_total_tokens": 320, "max_running_requests": 3}
NIGHT = [
    (1, 32, {"max_running_requests": 2}),
    (16, 16, {}),  # images are longer than a chunk
    (16, 256, LITTLE),
    (16, 32, {**TIERS, **LITTLE}),
    (4, 64, {"kv_cache_dtype": "float32", "attention_backend": "xla"}),
    (16, 64, {"disable_radix_cache": True, "mm_cache_size": 1}),
    (1, 16, {"max_running_requests": 16}),
]


@pytest.mark.parametrize(
    ("name", "page_size", "chunk", "options"),
    [
        (QWEN25, 16, 64, {}),
        (QWEN35, 4, 16, {}),
        (GEMMA3, 4, 32, {}),
        *(pytest.param(name, *row, marks=pytest.mark.long) for name in MODELS for row in NIGHT),
    ],
)
def test_answers_equal_transformers_cold_and_cached(cases, name, page_size, chunk, options):
    """All prompts together, with and without pictures; then each alone; and twice all, sixteen at a time."""
    case, folder = cases(name)
    with engine(folder, page_size=page_size, chunked_prefill_size=chunk, **options) as made:
        everything = list(range(len(case.prompts)))
        for start, rounds in ((0, [everything]), (-1, [[i] for i in everything]), (0, [everything * 2])):
            for at in rounds:
                results = answers(made, case, at, return_logprob=start == 0, logprob_start_len=0)
                if start == 0:
                    check(case, results, at)
                else:
                    assert [r["output_ids"] for r in results] == [case.tokens[i] for i in at]


def answers(made, case, at, **options):
    """What an engine answers to prompts of a case."""
    return made.generate(
        input_ids=[case.prompts[i] for i in at],
        image_data=[shown(case, i) for i in at],
        sampling_params=GREEDY,
        return_text_in_logprobs=False,
        **options,
    )


@pytest.mark.parametrize(
    "name", [pytest.param(QWEN25, marks=pytest.mark.long), QWEN35, pytest.param(GEMMA3, marks=pytest.mark.long)]
)
def test_answers_are_the_same_from_every_tier(cases, name, tmp_path):
    """From the host, from a store of files, and from the store in another engine."""
    case, folder = cases(name)
    tiers = {**TIERS, "page_size": 4, "chunked_prefill_size": 64, "max_total_tokens": 1024}
    tiers |= {"hicache_storage_backend": "file", "hicache_storage_prefetch_policy": "wait_complete"}
    settings = {"path": str(tmp_path), "min_free_space": 0, "prefetch_threshold": 4}
    tiers |= {"hicache_storage_backend_extra_config": json.dumps(settings)}
    everything = list(range(len(case.prompts)))

    def cached(made, tier):
        results = answers(made, case, everything)
        assert [r["output_ids"] for r in results] == [case.tokens[i] for i in everything]
        return sum(r["meta_info"]["cached_tokens_details"][tier] for r in results)

    with engine(folder, **tiers) as made:
        always_load(made)
        assert cached(made, "device") < 64
        if name == GEMMA3:
            # Of windows a tier keeps what resuming at a request's end needs; so does whoever resumes at a prompt's.
            answers(made, case, everything)
        settle(made)
        evict(made, Tier.DEVICE)
        assert cached(made, "host") > 64
        settle(made)
        made.flush_cache()
        assert cached(made, "storage") > 64
    with engine(folder, **tiers) as made:
        always_load(made)
        assert cached(made, "storage") > 64


def test_what_is_shared_is_what_shows_the_same(shared):
    """Text and picture the same: a hit. Another picture: up to it. Other text: its vectors alone. Tenants: nothing."""
    engine, _ = shared
    engine.flush_cache()
    cat, dog = picture(21, 100, 80), picture(22, 100, 80)
    close = cat.copy()
    close[50, 40, 1] ^= 1
    text, other = [*range(20), 501, 500, 502, *range(30, 40)], [*range(60, 81), 501, 500, 502, *range(30, 40)]
    for ids, image, tenant, cached, encoded in [
        (text, cat, "", 0, 1),
        (text, cat, "", 32, 0),  # whole pages
        (text, cat.copy(), "", 32, 0),
        (text, dog, "", 20, 1),  # up to the picture, to the page
        (text, close, "", 20, 1),
        (text, close, "", 32, 0),
        (other, cat, "", 0, 0),
        (text, cat, "somebody else", 0, 1),
    ]:
        meta, runs, _ = ask(engine, ids, image, tenant=tenant)
        size = meta["image_tokens"]
        assert meta["prompt_tokens"] == len(ids) - 1 + size
        want = cached if cached < 32 else (meta["prompt_tokens"] - 1) // 4 * 4
        assert (meta["cached_tokens"], runs) == (want, encoded)
        assert meta["cached_image_tokens"] == (size if want > 20 else 0)


def test_many_who_show_one_picture_have_it_encoded_once(shared):
    engine, _ = shared
    engine.flush_cache()
    before = encoded(engine)
    image = picture(31, 90, 150)
    prompts = [[i, 501, 500, 502, *range(i, i + 5)] for i in range(16)]
    answers = engine.generate(input_ids=prompts, image_data=[image] * 16, sampling_params=GREEDY)
    assert encoded(engine) == before + 1
    alone = engine.generate(input_ids=prompts[7], image_data=image, sampling_params=GREEDY)
    assert alone["output_ids"] == answers[7]["output_ids"]


def test_a_request_resumes_inside_a_picture_whose_places_see_no_others(shared):
    engine, _ = shared
    engine.flush_cache()
    image = picture(41, 200, 56)  # 14 places after 6 tokens: pages of 4 end inside it
    ids = [1, 2, 3, 4, 5, 6, 500]
    _, _, first = ask(engine, [*ids, *range(9)], image)
    meta, encoded, _ = ask(engine, ids, image)
    assert (meta["cached_tokens"], meta["cached_image_tokens"], encoded) == (16, 10, 0)
    meta, _, last = ask(engine, [*ids, *range(9)], image)
    assert meta["cached_tokens"] > 20
    assert last == first


@pytest.mark.parametrize(
    ("ids", "images", "kind", "says"),
    [
        ([1, 500, 2], None, RequestError, "token 500, which stands for an image, 1 times, and there are 0 images"),
        ([1, 500, 500, 2], [(1, 56, 84)], RequestError, "2 times, and there are 1 images"),
        ([1, 2], [(1, 56, 84)], RequestError, "0 times, and there are 1 images"),
        ([1, 500], [(1, 1, 300)], RequestError, "too thin"),
        ([1, 500], [b"no image"], RequestError, "not an image|no image|unknown"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(shared, ids, images, kind, says):
    engine, _ = shared
    images = None if images is None else [each if isinstance(each, bytes) else picture(*each) for each in images]
    with pytest.raises(kind, match=says):
        engine.generate(input_ids=ids, image_data=images)


def test_places_may_be_written_out(shared):
    engine, case = shared
    sizes = iter([6])
    ids = list(itertools.chain(*([500] * next(sizes) if t == 500 else [t] for t in case.prompts[1])))
    result = engine.generate(input_ids=ids, image_data=shown(case, 1), sampling_params=GREEDY)
    assert result["output_ids"] == case.tokens[1]


@pytest.mark.parametrize(("where", "seed"), [("begin", 51), ("go_on", 54)])
def test_an_encoder_that_fails_ends_those_who_wait_for_it_alone(shared, monkeypatch, where, seed):
    engine, case = shared
    encodings = engine._loop.machine.life.encodings

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(encodings._encoder, where, fail)
    image = picture(seed, 90, 90)
    results = engine.generate(
        input_ids=[[1, 500, 2], case.prompts[0]],
        image_data=[image, None],
        sampling_params=GREEDY,
        raise_on_failure=False,
    )
    assert "could not be encoded" in results[0]["meta_info"]["finish_reason"]["message"]
    assert results[1]["output_ids"] == case.tokens[0]
    monkeypatch.undo()
    assert ask(engine, [1, 500, 2], image)[1] == 1


def test_between_two_turns_of_an_encoder_lies_a_step(shared, monkeypatch):
    """Whoever comes while a picture is encoded waits for one turn, and not for that and somebody's large step."""
    engine, _ = shared
    encodings, machine, order = engine._loop.machine.life.encodings, engine._loop.machine, []
    turn, plan = encodings.turn, machine.scheduler.plan

    def turned(end):
        was = turn(end)
        order.extend(["pictures"] * was)
        return was

    monkeypatch.setattr(encodings, "turn", turned)
    monkeypatch.setattr(encodings, "_most", 1)  # a stage a turn
    monkeypatch.setattr(machine.scheduler, "plan", lambda: order.append("step") or plan())
    sampling = [{**GREEDY, "max_new_tokens": 4}, {**GREEDY, "max_new_tokens": 16, "ignore_eos": True}]
    seen = len(machine.recorder.timeline.steps)
    engine.generate(input_ids=[[1, 500, 2], [1, 2]], image_data=[picture(52, 90, 90), None], sampling_params=sampling)
    turns = [i for i, each in enumerate(order) if each == "pictures"]
    assert len(turns) >= 4
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(turns)), order
    kinds = [step.kind for step in machine.recorder.timeline.steps][seen:]
    assert kinds.count("encode") == len(turns), "the trace shows whom everybody waited for"


def test_a_decode_node_encodes_nothing_where_text_goes_on_for_a_page(case):
    case, folder = case
    with two_nodes(folder, page_size=4, chunked_prefill_size=64) as pair:
        for i in (0, 2, 6):
            result = pair.ask(case.prompts[i], 32, image_data=shown(case, i))
            assert result["output_ids"] == case.tokens[i], f"prompt {i}"
        nodes = pair.prefill, pair.decode
        assert [encoded(node) for node in nodes] == [2, 0]
        pair.check_idle()


@pytest.mark.parametrize("chunk", [1, 64], ids=["a stage at a time", "some tokens' worth"])
def test_decoding_waits_for_no_more_of_an_encoder_than_costs_a_few_tokens(shared, monkeypatch, chunk):
    """Counted in steps and multiplications, not in seconds: a step of all who decode follows whatever was encoded."""
    engine, _ = shared
    engine.flush_cache()
    encodings, runner = engine._loop.machine.life.encodings, engine._parts.runner
    encoder, most, seen = encodings._encoder.encoder, encodings._most * chunk // 64, []
    go_on, step = encodings._encoder.go_on, runner.step

    def encode(params, encoding, most):
        before, size = encoding.left, encoding.laid.valid.size
        done = go_on(params, encoding, most)
        costs = [encoder.cost(stage.kind, size) for stage in before[: len(before) - len(encoding.left)]]
        seen.append((len(costs), sum(costs)))
        return done

    def count(batch, *more):
        seen.append(int((batch.positions >= 0).sum()))
        return step(batch, *more)

    monkeypatch.setattr(encodings, "_most", most)
    monkeypatch.setattr(encodings._encoder, "go_on", encode)
    monkeypatch.setattr(runner, "step", count)
    spoken = engine.generate(input_ids=[3, 4, 5], sampling_params={**GREEDY, "max_new_tokens": 200}, stream=True)
    next(spoken)
    asked = engine.generate(input_ids=[1, 500, 2], image_data=picture(61 + chunk, 120, 180), sampling_params=GREEDY)
    assert len(asked["output_ids"]) == 32
    assert sum(1 for _ in spoken) > 50, "somebody decoded all the while"
    turns = [i for i, each in enumerate(seen) if isinstance(each, tuple)]
    assert len(turns) == len(encoder.stages(encoder.length(encoder.prepare(picture(0, 120, 180))))) or chunk > 1
    assert all(stages == 1 or cost <= most for stages, cost in (seen[i] for i in turns))
    for one, other in itertools.pairwise(turns):
        assert other - one > 1, "two turns of the encoder without a step between them"


def test_after_warming_up_nothing_compiles_for_an_image(cases):
    case, folder = cases(GEMMA3)
    with engine(folder, page_size=4, chunked_prefill_size=32, max_running_requests=1) as made:
        made.warm_up()
        before = made.stats()["compilations"]
        assert answers(made, case, [1])[0]["output_ids"] == case.tokens[1]
        assert made.stats()["compilations"] == before


def test_an_image_that_is_longer_than_a_step_is_refused_where_it_may_not_be_cut(cases):
    with engine(cases(GEMMA3)[1], chunked_prefill_size=8) as made, pytest.raises(RequestTooLarge) as refused:
        made.generate(input_ids=[1, 500, 2], image_data=picture(1, 50, 50))
    assert "takes 16 tokens, which are computed in one step, and chunked_prefill_size=8: raise it to 16" in str(
        refused.value
    )


def test_memory_for_images_is_counted(cases):
    with engine(cases(QWEN35)[1], mm_cache_size=3) as made:
        report = made.memory_report()
        assert report["image_bytes"] > 3 * 2**20
        assert f" - {report['image_bytes']} - " in report["derivation"]["available_kv_cache_bytes"]


def test_vectors_that_leave_the_device_come_from_host_memory(cases):
    """More pictures than the device keeps: with tiers each is encoded once, and the answers are the same."""
    _, folder = cases(QWEN35)
    prompts = [[i, 501, 500, 502, 7, i] for i in range(8)]
    pictures = [picture(70 + i, 160, 160) for i in range(8)]
    found = []
    for tiers in ({}, TIERS):
        with engine(folder, page_size=4, chunked_prefill_size=64, max_running_requests=1, **tiers) as made:
            encodings = made._loop.machine.life.encodings
            encodings._room = 2 * encodings.bytes_of(encodings._encoder.encoder, made._parts.runner, pictures[0])
            found.append([])
            for _ in range(2):
                given = made.generate(input_ids=prompts, image_data=pictures, sampling_params=GREEDY)
                found[-1] += [each["output_ids"] for each in given]
                settle(made)
                made._loop.call(made._cache.flush)  # of the KV alone
            counts = made.stats()["encoder"]
            assert counts["encoded"] == (8 if tiers else 16)
            assert (counts["host_bytes"] > 0) == bool(tiers)
            assert counts["bytes"] <= encodings._room
    assert found[0] == found[1]
