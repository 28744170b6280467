"""Answers that follow a JSON schema, a regular expression or a grammar."""

import json
import re

import jax
import numpy as np
import pytest
from idle import check_idle

import rootcellar
from rootcellar.engine.grammar import Grammar
from rootcellar.errors import RequestError
from rootcellar.runner import sampler
from rootcellar.sampling_params import SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["page", "lease"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine():
    with rootcellar.Engine(model_path="demo", max_total_tokens=2048, max_running_requests=8) as engine:
        yield engine
        check_idle(engine)


def _answers(engine, **params):
    results = engine.generate(prompt="The cache says", sampling_params={"max_new_tokens": 120, **params})
    results = results if isinstance(results, list) else [results]
    assert all(r["meta_info"]["finish_reason"]["type"] == "stop" for r in results)
    return [r["text"] for r in results]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "n": 4, "seed": 3}])
def test_a_json_schema_is_followed(engine, sampling):
    for text in _answers(engine, json_schema=json.dumps(SCHEMA), **sampling):
        value = json.loads(text)
        assert set(value) == {"name", "kind", "sizes"}
        assert len(value["name"]) <= 12
        assert value["kind"] in ("page", "lease")
        assert len(value["sizes"]) <= 3
        assert all(0 <= size <= 99 for size in value["sizes"])


def test_a_regular_expression_is_followed(engine):
    pattern = r"[a-f]{3}-[0-9]{4}(,[x-z]+!)?"
    for text in _answers(engine, regex=pattern, temperature=1, n=4, seed=1):
        assert re.fullmatch(pattern, text)


def test_a_grammar_is_followed(engine):
    grammar = 'root ::= animal " eats " animal\nanimal ::= "cat" | "mouse" | "the " animal'
    for text in _answers(engine, ebnf=grammar, temperature=1, n=4, seed=1):
        assert re.fullmatch(r"(the )*(cat|mouse) eats (the )*(cat|mouse)", text)


def test_what_runs_beside_a_grammar_is_not_changed_by_it(engine):
    plain = {"temperature": 0, "max_new_tokens": 20}
    alone = engine.generate(prompt="What is a page?", sampling_params=plain)
    bound = {**plain, "regex": "(yes|no)+", "ignore_eos": True}
    together = engine.generate(prompt=["What is a page?", "What is a page?"], sampling_params=[plain, bound])
    assert together[0]["output_ids"] == alone["output_ids"]
    assert re.fullmatch("(yes|no)*(y|ye|n)?", together[1]["text"])


def test_a_grammar_survives_retraction(engine):
    """The prompt and the answer so far are computed again; the answer goes on where it was."""
    params = {"json_schema": json.dumps(SCHEMA), "temperature": 0, "max_new_tokens": 120}
    expected = engine.generate(prompt="Tell me", sampling_params=params)
    stream = engine.generate(prompt="Tell me", sampling_params=params, stream=True)
    for _ in range(4):
        next(stream)
    engine.pause_generation("retract")
    engine.continue_generation()
    *_, result = stream
    assert result["meta_info"]["retractions"] == 1
    assert result["output_ids"] == expected["output_ids"]


def test_it_ends_where_it_may_and_min_new_tokens_cannot_go_beyond(engine):
    assert _answers(engine, regex="yes", temperature=0, min_new_tokens=50) == ["yes"]
    assert _answers(engine, regex="yes", temperature=0, ignore_eos=True) == ["yes"]


def test_logprobs_are_the_models_own(engine):
    """What the grammar left out of the choice still has its part of the probability."""
    result = engine.generate(
        prompt="x", sampling_params={"regex": "zq", "temperature": 0}, return_logprob=True, top_logprobs_num=1
    )
    (chosen, *_), (((likeliest, _, _),), *_) = (
        result["meta_info"]["output_token_logprobs"],
        result["meta_info"]["output_top_logprobs"],
    )
    assert chosen[0] < likeliest


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"json_schema": "{"}, "json_schema is not understood"),
        ({"json_schema": '{"type": 5}'}, "json_schema is not understood"),
        ({"regex": "("}, "regex is not understood"),
        ({"ebnf": "nonsense"}, "ebnf is not understood"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "can follow one of them"),
    ],
)
def test_what_is_no_grammar_is_refused(engine, params, said):
    with pytest.raises(RequestError, match=said):
        engine.generate(prompt="x", sampling_params=params)


def test_a_grammar_needs_the_tokenizer(tiny_folder):
    with (
        rootcellar.Engine(model_path=tiny_folder, max_total_tokens=256, skip_tokenizer_init=True) as engine,
        pytest.raises(RequestError, match="skip_tokenizer_init"),
    ):
        engine.generate(input_ids=[1], sampling_params={"regex": "a"})


def test_a_grammar_that_breaks_while_it_runs_ends_its_request_alone(engine, monkeypatch):
    expected = engine.generate(prompt="What is a page?", sampling_params={"temperature": 0, "max_new_tokens": 9})
    monkeypatch.setattr(Grammar, "allowed", lambda self: np.full(32, -1, np.int32))  # so a wrong token will be taken
    broken, other = engine.generate(
        prompt=["What is a page?"] * 2,
        sampling_params=[{"regex": "[0-9]+", "temperature": 0}, {"temperature": 0, "max_new_tokens": 9}],
    )
    assert broken["meta_info"]["finish_reason"]["cause"] == "grammar"
    assert other["output_ids"] == expected["output_ids"]


def test_after_a_warm_up_grammars_compile_nothing(tiny_folder):
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=512, max_running_requests=2, chunked_prefill_size=16
    ) as engine:
        engine.warm_up()
        before = engine.stats()["compilations"]
        for extra in ({}, {"presence_penalty": 0.5}, {"temperature": 0}):
            engine.generate(prompt=["ab", "cd"], sampling_params={"regex": "[a-z]{5}", **extra})
        assert engine.stats()["compilations"] == before


@pytest.mark.parametrize("vocab", [64, 70])
def test_only_allowed_tokens_are_chosen(vocab):
    """Against the obvious: whatever the sampling, a row's token is one whose bit is set."""
    rng = np.random.default_rng(vocab)
    empty = np.zeros(0, np.int32)
    rows, sets = [], []
    for i, params in enumerate([{"temperature": 0}, {"temperature": 5.0}, {"top_p": 0.5}, {"repetition_penalty": 1.5}]):
        chosen = rng.choice(vocab, 3, replace=False)
        bits = np.zeros(-(-vocab // 32), np.uint32)
        for token in chosen:
            bits[token // 32] |= np.uint32(1) << np.uint32(token % 32)
        sets.append(set(chosen.tolist()))
        rows.append(sampler.Sampled(SamplingParams(**params), i, 7, (), empty, empty, bits.view(np.int32)))
    rows.append(sampler.Sampled(SamplingParams(temperature=0), 9, 7, (), empty, empty))
    logits = rng.normal(size=(8, vocab)).astype(np.float32) * 5
    tokens, _ = jax.jit(sampler.sample)(logits, sampler.build(rows, 8, vocab))
    assert all(int(token) in allowed for token, allowed in zip(tokens, sets, strict=False))
    assert int(tokens[4]) == int(logits[4].argmax())
