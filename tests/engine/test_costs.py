"""What a request asks for is counted before anything is made of it, and made once."""

import time
import tracemalloc

import pytest
from idle import check_idle

import rootcellar
from rootcellar.engine.output import Tracker
from rootcellar.errors import RequestError, RequestTooLarge

SHORT = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_folder):
    with rootcellar.Engine(
        model_path=tiny_folder,
        max_total_tokens=2048,
        max_running_requests=2,
        chunked_prefill_size=64,
        max_queued_requests=1024,
        max_request_tokens=2**20,
        max_request_logprobs=2**17,
    ) as engine:
        yield engine
        check_idle(engine)


@pytest.mark.parametrize(
    ("params", "options", "said"),
    [
        ({"n": 128}, {}, "3072 sequences .*at most 1026.*max_queued_requests"),
        ({"n": 40, "max_new_tokens": 200}, {}, "1632000 tokens.*at most 1048576.*max_request_tokens"),
        ({"n": 20}, {"return_logprob": True, "logprob_start_len": 0}, "729600 logprobs.*at most 131072"),
        ({}, {"return_logprob": True, "top_logprobs_num": 20, "logprob_start_len": 1000}, "262080 logprobs"),
        ({"n": 10**12}, {}, "24000000000000 sequences"),
        ({"n": "x"}, {}, "n='x' is not allowed"),
        ({}, {"return_logprob": True, "top_logprobs_num": 21}, "from 0 to 20 .max_logprobs., not 21"),
    ],
)
def test_what_is_too_much_is_refused_before_anything_is_allocated(engine, params, options, said):
    """24 prompts of 1,500 tokens: their ids alone are 0.3 MB, what was asked for would be up to a gigabyte."""
    prompts = [[1 + i] * 1500 for i in range(24)]
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=said):
            engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 20, **params}, **options)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_offline_nothing_is_too_much_unless_a_limit_is_set(tiny_folder):
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=256, chunked_prefill_size=16, max_logprobs=30
    ) as engine:
        many = engine.generate(
            input_ids=[[1, 2]] * 40,
            sampling_params={"max_new_tokens": 1},
            return_logprob=True,
            top_logprobs_num=30,
        )
        assert all(len(each["meta_info"]["output_top_logprobs"][0]) == 30 for each in many)


def test_each_logprob_of_a_stream_is_made_once(engine, monkeypatch):
    made = []
    original = Tracker._entry

    def counted(self, value, token):
        made.append(token)
        return original(self, value, token)

    monkeypatch.setattr(Tracker, "_entry", counted)
    options = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 4}
    *_, last = engine.generate(input_ids=[3] * 60, sampling_params=SHORT, stream=True, **options)
    assert len(made) == (60 + 12) * 5 - 4  # nothing comes before the first token
    whole = engine.generate(input_ids=[3] * 60, sampling_params=SHORT, **options)
    for name in ("input_token_logprobs", "input_top_logprobs", "output_token_logprobs", "output_top_logprobs"):
        told, wanted = last["meta_info"][name], whole["meta_info"][name]
        assert [_ids(row) for row in told] == [_ids(row) for row in wanted]


def _ids(row):
    return None if row is None else [each[1] for each in row] if isinstance(row, list) else row[1]


def test_texts_are_left_out_where_they_are_not_wanted(engine):
    result = engine.generate(
        input_ids=[1, 2], sampling_params=SHORT, return_logprob=True, top_logprobs_num=1, return_text_in_logprobs=False
    )
    assert all(text is None for _, _, text in result["meta_info"]["output_token_logprobs"])
    assert all(text is None for ((_, _, text),) in result["meta_info"]["output_top_logprobs"])


def test_refusing_is_quick(engine):
    started = time.thread_time()
    with pytest.raises(RequestTooLarge):
        engine.generate(input_ids=[[1] * 1000] * 500, sampling_params={"n": 128, "max_new_tokens": 2})
    assert time.thread_time() - started < 2
