"""The same request gives the same tokens, whatever the cache, the batch and the memory do (invariant 5).

What is right was answered by transformers on torch (``tests/golden``); every configuration must answer the same.
"""

import random

import pytest
from idle import check_idle

import rootcellar
from checkpoints import golden

# One checkpoint of each family (Qwen2 is in the tests above), with 1, 2 and 4 KV heads, head_dim 64 and 128, tied and
# untied; tests/models covers all golden files without the engine, and the reference tests compare live.
FAMILIES = ["qwen3-tied-1kv-d128", "llama3-d128", "llama2-dynamic"]
AT_NIGHT = ["qwen2-1kv-d128", "llama2"]
GREEDY = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    case = golden("qwen2-4kv")
    folder = tmp_path_factory.mktemp("qwen2")
    case.make(folder)
    return case, folder


def engine(folder, **options):
    options = {"max_total_tokens": 4096, "max_running_requests": 4, "skip_tokenizer_init": True, **options}
    return rootcellar.Engine(model_path=folder, **options)


def run_twice(engine, case, batch, again=24, every=1):
    """Prompts in a shuffled order, ``batch`` at a time; then again, from the cache, for ``again`` tokens.

    ``every`` second, third and so on of them, the longest first. Returns the second results, by prompt.
    """
    order = list(range(15, -1, -every))
    random.Random(3).shuffle(order)
    for most in (64, again):
        results = {}
        for at in range(0, len(order), batch):
            part = order[at : at + batch]
            settings = {**GREEDY, "max_new_tokens": most}
            answers = engine.generate(input_ids=[case.prompts[i] for i in part], sampling_params=settings)
            results.update(zip(part, answers, strict=True))
        for i, result in results.items():
            assert result["output_ids"] == case.tokens[i][:most], f"prompt {i}"
    return results


@pytest.mark.parametrize(
    ("page_size", "chunk", "batch", "running", "backend"),
    [
        (1, 64, 16, 2, "auto"),
        (1, 16, 1, 1, "auto"),
        (16, 256, 16, 16, "auto"),
        (16, 7, 16, 2, "auto"),
        (64, 64, 16, 4, "auto"),
        (64, 16, 1, 1, "xla"),
        pytest.param(64, 256, 1, 1, "auto", marks=pytest.mark.long),
        pytest.param(64, 16, 16, 16, "auto", marks=pytest.mark.long),
        pytest.param(1, 256, 16, 16, "auto", marks=pytest.mark.long),
        pytest.param(1, 256, 16, 16, "xla", marks=pytest.mark.long),
        pytest.param(16, 7, 16, 16, "xla", marks=pytest.mark.long),
        pytest.param(16, 16, 16, 16, "auto", marks=pytest.mark.long),
    ],
)
def test_page_size_chunk_and_batch(case, page_size, chunk, batch, running, backend):
    case, folder = case
    options = {"page_size": page_size, "chunked_prefill_size": chunk, "attention_backend": backend}
    with engine(folder, max_running_requests=running, **options) as e:
        results = run_twice(e, case, batch, every=5 if batch == 1 else 1 if running == 16 else 2)
        for i, result in results.items():
            cached = result["meta_info"]["cached_tokens"]  # the second run comes from the cache
            assert cached == (len(case.prompts[i]) - 1) // page_size * page_size
        check_idle(e)


def test_cache_off(case):
    case, folder = case
    with engine(folder, disable_radix_cache=True) as e:
        results = run_twice(e, case, 16, again=1, every=2)
        assert all(r["meta_info"]["cached_tokens"] == 0 for r in results.values())
        check_idle(e)


@pytest.mark.parametrize("page_size", [16, pytest.param(1, marks=pytest.mark.long)])
def test_memory_so_scarce_that_requests_are_retracted_and_prefixes_evicted(case, page_size):
    case, folder = case
    longest = max(map(len, case.prompts)) + 64
    with engine(folder, page_size=page_size, max_total_tokens=2 * longest, chunked_prefill_size=64) as e:
        run_twice(e, case, 16)
        stats = e.stats()
        assert stats["retractions"] > 0
        assert stats["cache"]["full"]["DEVICE"]["evicted"] > 0
        check_idle(e)


@pytest.mark.parametrize(
    ("name", "every"),
    [(name, 2) for name in FAMILIES]
    + [pytest.param(name, 1, marks=pytest.mark.long) for name in (*FAMILIES, *AT_NIGHT)],
)
def test_every_family_answers_as_transformers(name, every, tmp_path):
    """By day with every second prompt, to the longest."""
    case = golden(name)
    case.make(tmp_path)
    with engine(tmp_path, chunked_prefill_size=64, max_running_requests=2) as e:
        which = range(every - 1, 16, every)
        prompts = [case.prompts[i] for i in which]
        room = [min(64, e.longest_prompt + 1 - len(prompt)) for prompt in prompts]
        settings = [{**GREEDY, "max_new_tokens": n} for n in room]
        answers = e.generate(input_ids=prompts, sampling_params=settings, return_logprob=True, logprob_start_len=0)
        for i, n, answer in zip(which, room, answers, strict=True):
            assert answer["output_ids"] == case.tokens[i][:n], f"prompt {i}"
            entries = answer["meta_info"]["input_token_logprobs"]
            assert [t for _, t, _ in entries] == case.prompts[i]
            assert entries[0][0] is None
            assert [v for v, _, _ in entries[1:]] == pytest.approx(case.logprobs[i], abs=1e-4)
        check_idle(e)
