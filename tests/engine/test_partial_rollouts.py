"""Answers that are interrupted, and weights that change under them: no token is lost, doubled, or another version's."""

import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idle import check_idle

import rootcellar
from rootcellar.errors import ConfigError
from rootcellar.models.config import load_config
from rootcellar.models.decoder import forward, logits
from rootcellar.models.dense import make_mix_dense
from rootcellar.models.loader import load_params

PROMPT = list(range(5, 75))
SAMPLING = {"temperature": 1.0, "max_new_tokens": 100, "ignore_eos": True, "seed": 4}
LENGTH = 256


@pytest.fixture(scope="module")
def cfg(tiny_folder):
    return load_config(tiny_folder)


@pytest.fixture(scope="module")
def versions(tiny_folder, cfg):
    """Weights by what they are called."""
    first = load_params(tiny_folder, cfg, jnp.float32)
    return {"0": first, "b": jax.tree.map(lambda a: a * 1.05, first), "c": jax.tree.map(lambda a: a * 0.95, first)}


@pytest.fixture
def engine(shared, versions):
    yield shared
    shared.continue_generation()
    shared.update_weights(versions["0"], "0")
    check_idle(shared)


@pytest.fixture(scope="module")
def shared(tiny_folder, versions):
    with rootcellar.Engine(
        model_path=tiny_folder,
        params=versions["0"],
        max_total_tokens=2048,
        max_running_requests=4,
        chunked_prefill_size=64,
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def logprobs_of(cfg, versions):
    """A version's logprobs of each token of a sequence after the first, computed without a cache."""

    @jax.jit
    def score(params, ids):
        hidden = forward(params, cfg, ids, make_mix_dense(cfg, [LENGTH]))
        scores = jax.nn.log_softmax(logits(params, cfg, hidden)[:-1])
        return jnp.take_along_axis(scores, ids[1:, None], axis=-1)[:, 0]

    def of(version, ids):
        padded = np.zeros(LENGTH, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(score(versions[version], padded))[: len(ids) - 1]

    return of


def interrupted(engine, after, then, **options):
    """The result of a request, of which ``then`` is called when it has ``after`` tokens or more."""
    called = False
    for result in engine.generate(
        input_ids=PROMPT, sampling_params=SAMPLING, stream=True, return_logprob=True, **options
    ):
        if not called and len(result["output_ids"]) >= after:
            called = True
            then()
    return result


def test_recomputed_each_token_is_of_the_version_that_it_is_labelled_with(engine, versions, logprobs_of):
    change = functools.partial(engine.update_weights, versions["b"], "b", on_weight_update="recompute")
    result = interrupted(engine, 10, change)
    meta = result["meta_info"]
    (first, start), (second, cut) = meta["weight_versions"]
    assert (first, start, second) == ("0", 0, "b")
    assert 10 <= cut < 100
    assert meta["retractions"] == 1
    assert "kv_weight_versions" not in meta
    ids = PROMPT + result["output_ids"]
    said = np.array([value for value, *_ in meta["output_token_logprobs"]])
    expected = {version: logprobs_of(version, ids)[len(PROMPT) - 1 :] for version in ("0", "b")}
    np.testing.assert_allclose(said[:cut], expected["0"][:cut], atol=1e-4)
    np.testing.assert_allclose(said[cut:], expected["b"][cut:], atol=1e-4)
    assert np.abs(expected["0"] - expected["b"]).max() > 1e-2


def test_kept_it_says_whose_kv_each_token_has(engine, versions, logprobs_of):
    result = interrupted(engine, 10, lambda: engine.update_weights(versions["b"], "b"))
    meta = result["meta_info"]
    (_, _), (_, cut) = meta["weight_versions"]
    assert meta["kv_weight_versions"] == [("0", 0), ("b", len(PROMPT) + cut - 1)]
    said = np.array([value for value, *_ in meta["output_token_logprobs"]])
    alone = logprobs_of("b", PROMPT + result["output_ids"])[len(PROMPT) - 1 :]
    assert np.abs(said[cut:] - alone[cut:]).max() > 1e-3  # it looks at what another version computed

    def twice():
        engine.update_weights(versions["b"], "b")
        engine.update_weights(versions["c"], "c")
        engine.pause_generation("retract")  # and then all of it is computed anew
        engine.continue_generation()

    meta = interrupted(engine, 10, twice)["meta_info"]
    assert meta["weight_versions"][-1][0] == "c"
    assert meta["kv_weight_versions"] == [("c", 0)]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_changes_no_token(engine, mode):
    expected = engine.generate(input_ids=PROMPT, sampling_params=SAMPLING)["output_ids"]

    def pause():
        engine.pause_generation(mode)
        engine.continue_generation()

    assert interrupted(engine, 10, pause)["output_ids"] == expected


def test_an_aborted_answer_goes_on_with_the_tokens_that_it_had(engine):
    expected = engine.generate(input_ids=PROMPT, sampling_params=SAMPLING)["output_ids"]
    part = interrupted(engine, 30, lambda: engine.abort_request("mine"), rid="mine")
    assert part["meta_info"]["finish_reason"]["type"] == "abort"
    had = part["output_ids"]
    assert had == expected[: len(had)]
    assert 30 <= len(had) < 100
    rest = engine.generate(
        input_ids=PROMPT + had, sampling_params={**SAMPLING, "max_new_tokens": 100 - len(had)}
    )  # of one seed each place of a sequence draws the same
    assert had + rest["output_ids"] == expected
    assert rest["meta_info"]["cached_tokens"] >= len(PROMPT) + len(had) - 16


@pytest.mark.parametrize("updates", [12, pytest.param(200, marks=pytest.mark.long)])
def test_answers_while_weights_are_pushed(engine, versions, logprobs_of, updates):
    """Nothing is lost or doubled, compiles or stays behind, and no token is of another version than its label."""
    engine.warm_up()
    asked, stop, results, came = 3, threading.Event(), [], threading.Semaphore(0)
    compiled = engine.stats()["compilations"]

    def caller(number):
        i = 0
        while not stop.is_set():
            i += 1
            sampling = {**SAMPLING, "max_new_tokens": 60, "seed": 1000 * number + i, "n": 2}
            results.append(
                engine.generate(input_ids=PROMPT[: 40 + number], sampling_params=sampling, return_logprob=True)
            )
            came.release()

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(asked)]
    for each in callers:
        each.start()
    names = {}
    for i in range(updates):
        assert came.acquire(timeout=60)
        names[str(i + 1)] = "bc"[i % 2]
        engine.update_weights(versions["bc"[i % 2]], str(i + 1), on_weight_update="recompute")
    stop.set()
    for each in callers:
        each.join(timeout=60)
    assert engine.stats()["compilations"] == compiled
    mixed = 0
    for pair in results:
        assert [len(answer["output_ids"]) for answer in pair] == [60, 60]
        for answer in pair:
            meta = answer["meta_info"]
            prompt = meta["prompt_tokens"]
            spans = [*meta["weight_versions"], (None, 60)]
            assert [start for _, start in spans] == sorted({start for _, start in spans})
            mixed += len(spans) > 2
            said = np.array([value for value, *_ in meta["output_token_logprobs"]])
            for (version, start), (_, end) in itertools.pairwise(spans):
                of = names.get(version, "0")
                expected = logprobs_of(of, PROMPT[:prompt] + answer["output_ids"])[prompt - 1 :]
                np.testing.assert_allclose(said[start:end], expected[start:end], atol=1e-4)
    assert mixed


def test_what_becomes_of_kv_is_one_of_two_things(engine, versions):
    with pytest.raises(ConfigError, match="keep, recompute"):
        engine.update_weights(versions["b"], on_weight_update="forget")
