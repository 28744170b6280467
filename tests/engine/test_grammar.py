"""Answers that follow a JSON schema, a regular expression or a grammar."""

import asyncio
import contextlib
import json
import re
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from idle import check_idle

import rootcellar
from rootcellar.engine.grammar import Grammar
from rootcellar.errors import EngineError, RequestError
from rootcellar.grammars.process import Worker
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


def _chain(n):
    links = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(n)}
    return json.dumps({"$defs": {**links, f"a{n}": {"type": "integer"}}, "$ref": "#/$defs/a0"})


def _rules(n):
    return "root ::= a0\n" + "\n".join(f'a{i} ::= "x" a{i + 1}' for i in range(n)) + f'\na{n} ::= "y" | "z" a{n}'


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
        ({"json_schema": "5"}, "json_schema is not understood"),
        ({"json_schema": '{"$ref": "#/none"}'}, "json_schema: .*#/none.* leads nowhere"),
        ({"json_schema": "[" * 100_000}, "json_schema is not understood"),
        ({"regex": "a" * 200_000}, "regex has 200000 characters: .*max_grammar_length"),
        ({"json_schema": _chain(2000)}, "json_schema is 4003 levels deep.*max_grammar_depth"),
        ({"ebnf": _rules(3000)}, "ebnf is 3002 levels deep"),
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
        raise_on_failure=False,
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


# -- where grammars are compiled ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lax(tiny_folder):
    """An engine whose bounds let through what kills the process that compiles."""
    with rootcellar.Engine(
        model_path=tiny_folder,
        max_total_tokens=256,
        max_running_requests=2,
        chunked_prefill_size=16,
        max_grammar_depth=10**6,
        max_grammar_length=10**6,
        grammar_compile_timeout=3,
    ) as engine:
        yield engine


def _children():
    """Processes of ours that compile grammars."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread, or a process, that has ended meanwhile
            for pid in (task / "children").read_text().split():
                found += [pid] * (b"grammars" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


def test_a_grammar_that_kills_its_compiler_is_refused_and_the_next_is_served(lax):
    for grammar in ({"json_schema": _chain(3000)}, {"ebnf": _rules(8000)}):
        with pytest.raises(RequestError, match=r"ended its process \(SIGSEGV\)"):
            lax.generate(prompt="x", sampling_params=grammar)
        assert lax.generate(prompt="x", sampling_params={"regex": "yes"})["text"] == "yes"


def test_neither_the_event_loop_nor_other_requests_wait_for_a_grammar(lax):
    """While one compiles for seconds, others are answered; then it is refused."""
    slow = json.dumps({"type": "integer", "multipleOf": 999_979})
    plain = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}

    async def both():
        waiting = asyncio.create_task(lax.async_generate(prompt="x", sampling_params={"json_schema": slow}))
        answered = 0
        while not waiting.done():
            await lax.async_generate(prompt="x", sampling_params=plain)
            answered += 1
        with pytest.raises(RequestError, match=r"grammar_compile_timeout|ended its process"):
            await waiting
        return answered

    assert asyncio.run(both()) > 10
    assert lax.generate(prompt="x", sampling_params={"regex": "no"})["text"] == "no"


def test_a_grammar_is_compiled_once(tiny_folder, monkeypatch):
    tried = []
    original = Worker.try_out

    def counted(self, kind, source, seconds):
        tried.append(source)
        return original(self, kind, source, seconds)

    monkeypatch.setattr(Worker, "try_out", counted)
    with rootcellar.Engine(model_path=tiny_folder, max_total_tokens=256, chunked_prefill_size=16) as engine:
        for _ in range(2):
            engine.generate(prompt=["a", "b"], sampling_params={"regex": "[ab]c", "n": 2})
        assert tried == ["[ab]c"]


def test_nothing_is_started_before_the_first_grammar_and_nothing_is_left_behind(tiny_folder):
    before = _children()
    with rootcellar.Engine(model_path=tiny_folder, max_total_tokens=256, chunked_prefill_size=16) as engine:
        engine.generate(prompt="x", sampling_params={"max_new_tokens": 1})
        assert _children() == before
        engine.generate(prompt="x", sampling_params={"regex": "a"})
        assert len(_children()) == len(before) + 1
    assert _children() == before


def test_a_shutdown_ends_what_is_being_compiled(tiny_folder, monkeypatch):
    slow = json.dumps({"type": "integer", "multipleOf": 999_979})
    said = []

    def ask(engine):
        try:
            engine.generate(prompt="x", sampling_params={"json_schema": slow})
        except Exception as error:
            said.append(error)

    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=256, chunked_prefill_size=16, grammar_compile_timeout=600
    ) as engine:
        engine.generate(prompt="x", sampling_params={"regex": "a"})
        grammars, begun = engine._parts.grammars, threading.Event()
        compile_all = grammars._compile_all
        monkeypatch.setattr(grammars, "_compile_all", lambda keys: begun.set() or compile_all(keys))
        thread = threading.Thread(target=ask, args=(engine,))
        thread.start()
        assert begun.wait(60)
    thread.join(timeout=60)
    assert isinstance(said[0], EngineError)


def test_a_compiler_that_does_not_start_is_an_error(tiny_folder, monkeypatch):
    monkeypatch.setattr("rootcellar.child._PROGRAM", "raise SystemExit('no such interpreter')")
    with (
        rootcellar.Engine(model_path=tiny_folder, max_total_tokens=256, chunked_prefill_size=16) as engine,
        pytest.raises(EngineError, match="does not start: no such interpreter"),
    ):
        engine.generate(prompt="x", sampling_params={"regex": "a"})


# -- what they mean -------------------------------------------------------------------------------------------------


def test_objects_are_closed_unless_they_say_otherwise(engine):
    schema = {"type": "object", "properties": {"shared": {"type": "boolean"}}, "required": ["shared"]}
    for text in _answers(engine, json_schema=schema, temperature=1.5, n=4, seed=1):
        assert set(json.loads(text)) == {"shared"}
    grammar = engine._parts.grammars.start([SamplingParams(json_schema=json.dumps(schema))]).result()[0]
    assert not _follows(engine, grammar, '{"shared":true,"x":1}')
    schema["additionalProperties"] = True
    grammar = engine._parts.grammars.start([SamplingParams(json_schema=json.dumps(schema))]).result()[0]
    assert _follows(engine, grammar, '{"shared":true,"x":1}')


def test_digits_of_an_expression_are_ascii(engine):
    for pattern, text, right in [
        (r"\d+", "12", True),
        (r"\d+", "\u0663", False),
        (r"[\dx]+", "\u0663", False),
        (r"\w+", "\u00e9", False),
        (r"\W+", "\u00e9", True),
        (r"[^\d]+", "\u0663", True),
        (r"\s", "\u2003", False),
    ]:
        grammar = engine._parts.grammars.start([SamplingParams(regex=pattern)]).result()[0]
        assert _follows(engine, grammar, text) is right, (pattern, text)


def _follows(engine, grammar, text):
    """Whether ``text`` may be, or may begin, an answer."""
    for token in engine.encode(text):
        if not grammar.allowed()[token // 32] >> (token % 32) & 1:
            return False
        grammar.take(token)
    return True
