"""The engine's interface: results, streams, stops, logprobs, sampling."""

import asyncio
import itertools
import json

import pytest
from idle import check_idle

import rootcellar
from checkpoints import make_checkpoint
from rootcellar.errors import ModelError, RequestError
from slowly import slowly

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
PROMPT = list(range(5, 45))


# -- results -----------------------------------------------------------------------------------------------------------


def test_one_prompt_gives_a_dict_and_a_list_gives_a_list(engine):
    one = engine.generate(prompt="hello world", sampling_params=GREEDY)
    many = engine.generate(prompt=["hello world", "another"], sampling_params=[GREEDY, {**GREEDY, "max_new_tokens": 3}])
    assert one["output_ids"] == many[0]["output_ids"]
    assert len(many[1]["output_ids"]) == 3
    meta = one["meta_info"]
    assert meta["prompt_tokens"] == 10
    assert meta["completion_tokens"] == 12
    assert meta["finish_reason"] == {"type": "length", "length": 12}
    assert 0 <= meta["queue_time"] <= meta["first_token_latency"] <= meta["e2e_latency"]
    stages = ["TOKENIZE", "PREFILL_WAITING", "PREFILL_FORWARD", "DECODE_LOOP", "FINISHED"]
    assert [name for name, _ in meta["stages"]] == stages


def test_text_and_ids_are_the_same_prompt(engine, tiny_folder):
    text = engine.generate(prompt="the quick brown fox", sampling_params=GREEDY)
    ids = engine.generate(input_ids=engine.encode("the quick brown fox"), sampling_params=GREEDY)
    assert text["output_ids"] == ids["output_ids"]
    assert text["text"] == ids["text"]


def test_the_second_time_comes_from_the_cache(engine):
    first, second = (engine.generate(input_ids=PROMPT, sampling_params=GREEDY) for _ in range(2))
    assert [first["meta_info"]["cached_tokens"], second["meta_info"]["cached_tokens"]] == [0, 32]
    assert first["output_ids"] == second["output_ids"]


def test_extra_key_isolates(engine):
    cached = [
        engine.generate(input_ids=PROMPT, sampling_params=GREEDY, extra_key=key)["meta_info"]["cached_tokens"]
        for key in ("a", "b", "a")
    ]
    assert cached == [0, 0, 32]


def test_n_answers_share_the_prompts_kv(engine):
    answers = engine.generate(input_ids=PROMPT, sampling_params={"n": 3, "seed": 1, "max_new_tokens": 8})
    assert len({tuple(a["output_ids"]) for a in answers}) == 3
    assert [a["meta_info"]["cached_tokens"] for a in answers] == [0, 32, 32]


def test_params_can_be_handed_over(tiny_folder, engine):
    import jax.numpy as jnp

    from rootcellar.models.config import load_config
    from rootcellar.models.loader import load_params

    params = load_params(tiny_folder, load_config(tiny_folder), jnp.float32)
    with rootcellar.Engine(model_path=tiny_folder, params=params, max_total_tokens=256) as other:
        assert (
            other.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
            == engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
        )
    del params["norm"]
    with pytest.raises(ModelError, match="norm"):
        rootcellar.Engine(model_path=tiny_folder, params=params)


def test_dummy_weights_need_no_tensors(tmp_path):
    folder = make_checkpoint("qwen3", tmp_path)
    (folder / "model.safetensors").unlink()
    with rootcellar.Engine(
        model_path=folder, load_format="dummy", skip_tokenizer_init=True, max_total_tokens=256
    ) as engine:
        result = engine.generate(input_ids=[1, 2, 3], sampling_params=GREEDY)
        assert len(result["output_ids"]) == 12
        assert "text" not in result


def test_no_new_tokens_computes_the_prompt_only(engine):
    result = engine.generate(
        input_ids=PROMPT, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0
    )
    assert result["output_ids"] == []
    assert len(result["meta_info"]["input_token_logprobs"]) == len(PROMPT)


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_grows_to_the_result(engine):
    whole = engine.generate(prompt="hello", sampling_params=GREEDY)
    parts = list(engine.generate(prompt="hello", sampling_params=GREEDY, stream=True))
    assert parts[-1]["text"] == whole["text"]
    assert [len(p["output_ids"]) for p in parts] == list(range(1, 13))
    assert all(b["text"].startswith(a["text"]) for a, b in itertools.pairwise(parts))
    assert [p["meta_info"]["finish_reason"] is None for p in parts] == [True] * 11 + [False]


def test_streams_of_several_prompts_say_whose_part_it_is(engine):
    last = {}
    for part in engine.generate(prompt=["hello", "world"], sampling_params=GREEDY, stream=True):
        last[part["index"]] = part
    assert {i: len(p["output_ids"]) for i, p in last.items()} == {0: 12, 1: 12}


def test_leaving_a_stream_early_aborts(engine):
    stream = engine.generate(prompt="hello", sampling_params={**GREEDY, "max_new_tokens": 500}, stream=True)
    next(stream)
    stream.close()
    assert engine.stats()["running"] == 0


def test_leaving_a_stream_before_its_first_result_aborts(engine):
    settings = {**GREEDY, "max_new_tokens": 900}
    engine.generate(prompt="hello", sampling_params=settings, stream=True).close()
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0

    async def main():
        stream = await engine.async_generate(prompt="hello", sampling_params=settings, stream=True)
        await stream.aclose()
        assert engine.stats()["running"] == engine.stats()["waiting"] == 0

    asyncio.run(main())


def test_async_generate(engine):
    async def main():
        whole, parts = await asyncio.gather(
            engine.async_generate(prompt="hello", sampling_params=GREEDY), collect(engine)
        )
        return whole, parts

    async def collect(engine):
        stream = await engine.async_generate(prompt="hello", sampling_params=GREEDY, stream=True)
        return [part async for part in stream]

    whole, parts = asyncio.run(main())
    assert parts[-1]["output_ids"] == whole["output_ids"]
    sizes = [len(part["output_ids"]) for part in parts]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 12


def test_cancelling_a_task_while_it_is_being_submitted_aborts(engine):
    """Whenever the cancellation comes, nothing is left running: before, while or after the request is taken in."""

    async def main(delay):
        settings = {**GREEDY, "max_new_tokens": 900}
        task = asyncio.create_task(engine.async_generate(prompt="hello", sampling_params=settings))
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stats = engine.stats()
        assert stats["running"] == stats["waiting"] == 0

    with slowly(engine):
        for delay in (0, 0.0005, 0.001, 0.002, 0.004):
            asyncio.run(main(delay))


def test_cancelling_a_task_aborts(engine):
    async def main():
        settings = {**GREEDY, "max_new_tokens": 900}
        task = asyncio.create_task(engine.async_generate(prompt="hello", sampling_params=settings))
        while engine.stats()["running"] == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.stats()["running"] == 0

    with slowly(engine):
        asyncio.run(main())


# -- where it ends -----------------------------------------------------------------------------------------------------


def test_stop_token_ids(engine):
    whole = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    stop = whole[4]
    result = engine.generate(input_ids=PROMPT, sampling_params={**GREEDY, "stop_token_ids": [stop]})
    end = whole.index(stop) + 1
    assert result["output_ids"] == whole[:end]
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    later = engine.generate(
        input_ids=PROMPT, sampling_params={**GREEDY, "stop_token_ids": [stop], "min_new_tokens": 12}
    )
    assert stop not in later["output_ids"]
    assert len(later["output_ids"]) == 12


def test_stop_strings_end_the_text_and_never_show_in_a_stream(engine):
    whole = engine.generate(input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 40})["text"]
    at = next(i for i in range(5, len(whole) - 3) if whole.find(whole[i : i + 3]) == i)
    stop = whole[at : at + 3]
    settings = {**GREEDY, "max_new_tokens": 40, "stop": [stop, "never said"]}
    parts = list(engine.generate(input_ids=PROMPT, sampling_params=settings, stream=True))
    assert parts[-1]["text"] == whole[:at]
    assert parts[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert all(whole[:at].startswith(p["text"]) for p in parts)
    kept = engine.generate(input_ids=PROMPT, sampling_params={**settings, "no_stop_trim": True})
    assert kept["text"] == whole[: at + 3]


def test_eos_of_the_model_ends_unless_ignored(tmp_path):
    folder = make_checkpoint("qwen2", tmp_path, eos_token_id=[1, 2])
    with rootcellar.Engine(model_path=folder, skip_tokenizer_init=True, max_total_tokens=256) as engine:
        whole = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    config = folder / "config.json"
    config.write_text(config.read_text().replace("[\n  1,\n  2\n ]", f"[1, {whole[3]}]"))
    with rootcellar.Engine(model_path=folder, skip_tokenizer_init=True, max_total_tokens=256) as engine:
        result = engine.generate(input_ids=PROMPT, sampling_params={"temperature": 0, "max_new_tokens": 12})
        assert result["output_ids"] == whole[: whole.index(whole[3]) + 1]


def test_the_end_that_only_the_tokenizer_names_ends_too(tmp_path):
    """Its configs name another token, as a base model's do whose chat template came later."""
    folder = make_checkpoint("qwen2", tmp_path, tokenizer=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    last = config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    options = {"temperature": 0, "max_new_tokens": 8}
    with rootcellar.Engine(model_path=folder, max_total_tokens=256) as engine:
        whole = engine.generate(input_ids=PROMPT, sampling_params={**options, "ignore_eos": True})["output_ids"]
        assert len(whole) == 8
    assert last not in whole
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    word = next(text for text, id in vocabulary.items() if id == whole[3])
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": word}))
    with rootcellar.Engine(model_path=folder, max_total_tokens=256) as engine:
        result = engine.generate(input_ids=PROMPT, sampling_params=options)
        assert result["output_ids"] == whole[: whole.index(whole[3]) + 1]
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": whole[3]}
        assert engine.generate(input_ids=PROMPT, sampling_params={**options, "ignore_eos": True})["output_ids"] == whole


# -- logprobs ----------------------------------------------------------------------------------------------------------


def test_logprobs_of_prompt_and_answer_do_not_depend_on_the_cache(engine):
    def ask(**options):
        result = engine.generate(
            input_ids=PROMPT, sampling_params=GREEDY, return_logprob=True, top_logprobs_num=3, **options
        )
        return result["meta_info"]

    cold = ask(logprob_start_len=0)
    warm = ask(logprob_start_len=0)
    part = ask(logprob_start_len=30)
    for name in ("input_token_logprobs", "output_token_logprobs"):
        assert [e[1] for e in cold[name]] == [e[1] for e in warm[name]]
        assert [e[0] for e in cold[name][1:]] == pytest.approx([e[0] for e in warm[name][1:]], abs=1e-4)
    assert part["cached_tokens"] == 16  # position 29 says how likely token 30 is, and its page begins at 16
    assert [e[0] for e in part["input_token_logprobs"]] == pytest.approx(
        [e[0] for e in cold["input_token_logprobs"][30:]], abs=1e-4
    )
    assert "input_token_logprobs" not in ask()
    for meta in (cold, part):
        chosen = [e[0] for e in meta["output_token_logprobs"]]
        best = [row[0] for row in meta["output_top_logprobs"]]
        assert chosen == pytest.approx([b[0] for b in best], abs=1e-5)  # greedy takes the likeliest
        assert all(len(row) == 3 and row[0][0] >= row[1][0] >= row[2][0] for row in meta["output_top_logprobs"])


def test_an_answers_logprobs_are_those_of_the_same_tokens_in_a_prompt(engine):
    answer = engine.generate(input_ids=PROMPT, sampling_params=GREEDY, return_logprob=True)
    again = engine.generate(
        input_ids=PROMPT + answer["output_ids"],
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=len(PROMPT),
    )
    assert [e[0] for e in again["meta_info"]["input_token_logprobs"]] == pytest.approx(
        [e[0] for e in answer["meta_info"]["output_token_logprobs"]], abs=1e-4
    )


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_seed_makes_an_answer_reproducible_whatever_runs_beside_it(engine):
    settings = {"seed": 5, "max_new_tokens": 10, "temperature": 1.5, "ignore_eos": True}
    alone = engine.generate(input_ids=PROMPT, sampling_params=settings)["output_ids"]
    beside = engine.generate(
        input_ids=[[9, 9], PROMPT, [3]], sampling_params=[{"max_new_tokens": 10}, settings, {"max_new_tokens": 4}]
    )
    assert beside[1]["output_ids"] == alone
    assert engine.generate(input_ids=PROMPT, sampling_params={**settings, "seed": 6})["output_ids"] != alone


def test_penalties_change_the_answer(engine):
    plain = engine.generate(input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 60})["output_ids"]
    settings = {**GREEDY, "max_new_tokens": 60, "presence_penalty": 2.0, "frequency_penalty": 2.0}
    penalised = engine.generate(input_ids=PROMPT, sampling_params=settings)["output_ids"]
    assert len(set(penalised)) > len(set(plain))


def test_a_bias_forces_and_bans_and_compiles_nothing_new(engine):
    engine.warm_up()
    plain = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    before = engine.stats()["compilations"]
    forced, banned, beside = engine.generate(
        input_ids=[PROMPT] * 3,
        sampling_params=[{**GREEDY, "logit_bias": {"7": 100}}, {**GREEDY, "logit_bias": {plain[0]: -100}}, GREEDY],
        return_logprob=True,
    )
    assert set(forced["output_ids"]) == {7}
    assert plain[0] not in banned["output_ids"]
    assert beside["output_ids"] == plain
    assert engine.stats()["compilations"] == before
    with pytest.raises(RequestError, match="logit_bias: ids of this model are 0 to"):
        engine.generate(input_ids=PROMPT, sampling_params={"logit_bias": {10**6: 1}})


def test_a_prompt_that_waits_finds_its_prefix_though_what_runs_needs_the_room(tiny_folder):
    """One row, and no room for all: what is asked for next is what stays, though it was used longest ago."""
    prompts = [[*range(10 + 40 * i, 50 + 40 * i)] for i in range(4)]
    options = {"max_total_tokens": 128, "page_size": 4, "max_running_requests": 1, "schedule_policy": "fcfs"}
    one = {**GREEDY, "max_new_tokens": 1}
    with rootcellar.Engine(model_path=tiny_folder, skip_tokenizer_init=True, **options) as engine:
        for ids in prompts[:3]:
            engine.generate(input_ids=ids, sampling_params=one)
        results = engine.generate(input_ids=[prompts[3], [*prompts[0], 7]], sampling_params=one)
        assert [each["meta_info"]["cached_tokens"] for each in results] == [0, 40]
        for ids in prompts[1:]:
            engine.generate(input_ids=ids, sampling_params=one)
        gone = engine.generate(input_ids=[*prompts[0], 7], sampling_params=one)
        assert gone["meta_info"]["cached_tokens"] < 40, "nobody waits for it any more"
        check_idle(engine)
