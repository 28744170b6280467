"""Every architecture with other layers than full attention answers as transformers did, whatever the cache does.

Two engines, so that every setting meets: one with tiny pages and chunks and all prompts at once, and one with larger
pages, whole prompts, one request at a time, and so little room beside the full layers' that only windows, chunks or
states are evicted. By day each architecture meets one of them; the rest runs at night.
"""

import itertools

import pytest
from idle import check_idle

import rootcellar
from checkpoints import golden

CASES = ["mistral-window", "gemma3", "gpt-oss", "llama4"]


OTHERS = [
    *("olmo2", "olmo3", "phi3", "smollm3", "glm4", "glm4-moe", "granite4", "qwen2-moe", "qwen3-moe"),
    *("nemotron-h", "gemma4"),
]


def by_day(*names):
    """Every case, those of ``names`` by day."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.long) for name in CASES]


GREEDY = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}
HALF = range(1, 16, 2)
"""Of the prompts: lengths from 2 to 100, on both sides of a page, a window and a chunk."""


def engine(folder, **options):
    options = {"max_total_tokens": 4096, "max_running_requests": 4, "skip_tokenizer_init": True, **options}
    return rootcellar.Engine(model_path=folder, **options)


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    case = golden(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    case.make(folder)
    return case, folder


def ask(engine, case, batch, which, most=64):
    """Ask the prompts of ``which`` in order, ``batch`` at a time: the answers are those of transformers.

    Returns the cached tokens of each.
    """
    settings = {**GREEDY, "max_new_tokens": most}
    cached = {}
    for at in range(0, len(which), batch):
        part = which[at : at + batch]
        answers = engine.generate(input_ids=[case.prompts[i] for i in part], sampling_params=settings)
        for i, answer in zip(part, answers, strict=True):
            assert answer["output_ids"] == case.tokens[i][:most], f"prompt {i}"
            cached[i] = answer["meta_info"]["cached_tokens"]
    return cached


def whole_pages(case, i, page_size):
    return (len(case.prompts[i]) - 1) // page_size * page_size


@pytest.mark.parametrize("case", by_day("gemma3", "llama4"), indirect=True)
@pytest.mark.parametrize(
    ("page_size", "chunk", "batch", "running"),
    [
        (1, 16, 16, 4),
        pytest.param(1, 16, 16, 16, marks=pytest.mark.long),
        pytest.param(16, 16, 16, 16, marks=pytest.mark.long),
        pytest.param(1, 256, 1, 16, marks=pytest.mark.long),
        pytest.param(1, 16, 1, 16, marks=pytest.mark.long),
        pytest.param(16, 256, 16, 16, marks=pytest.mark.long),
    ],
)
def test_cold_and_from_the_cache(case, page_size, chunk, batch, running):
    cold_and_from_the_cache(*case, page_size, chunk, batch, running)


def cold_and_from_the_cache(case, folder, page_size, chunk, batch, running):
    """Where few may run at once, with half of the prompts."""
    which = range(16) if running == 16 else HALF
    with engine(folder, page_size=page_size, chunked_prefill_size=chunk, max_running_requests=running) as e:
        ask(e, case, batch, which)
        cached = ask(e, case, batch, which, most=24)
        assert cached == {i: whole_pages(case, i, page_size) for i in which}
        drop_and_rebuild(e, case, page_size)
        check_idle(e)


# Of what these add to a layer each case below has one thing more: norms of all heads, squashed scores, multipliers,
# one tensor for several.
@pytest.mark.parametrize("name", ["gemma2", *(pytest.param(n, marks=pytest.mark.long) for n in OTHERS)])
def test_other_families_cold_and_from_the_cache(name, tmp_path):
    case, which = golden(name), [3, 9, 14]
    case.make(tmp_path)
    with engine(tmp_path, page_size=16, chunked_prefill_size=64) as e:
        ask(e, case, 3, which)
        cached = ask(e, case, 3, which, most=24)
        assert cached[14] == whole_pages(case, 14, 16)
        check_idle(e)


LATENT = ["deepseek2", "deepseek2-lite", "deepseek3", "deepseek3-yarn"]


@pytest.mark.parametrize(
    ("name", "page_size", "chunk", "batch", "running"),
    [
        ("deepseek3", 1, 16, 16, 4),
        *(
            pytest.param(*setting, 16, marks=pytest.mark.long)
            for setting in itertools.product(LATENT, (1, 16), (16, 256), (1, 16))
        ),
    ],
)
def test_latents_cold_and_from_the_cache(name, page_size, chunk, batch, running, tmp_path):
    case = golden(name)
    case.make(tmp_path)
    cold_and_from_the_cache(case, tmp_path, page_size, chunk, batch, running)


def drop_and_rebuild(engine, case, page_size):
    """Every kind's pages wait on the host and are hits again; without ``preserve`` they are gone. Nothing compiles."""
    longest = [len(case.prompts) - 1]
    for preserve in (True, False):
        engine.release_memory_occupation("kv_cache", preserve=preserve)
        engine.resume_memory_occupation("kv_cache")
        compiled = engine.stats()["compilations"]
        cached = ask(engine, case, 1, longest, most=24)
        assert cached[longest[0]] == (whole_pages(case, longest[0], page_size) if preserve else 0)
        assert preserve or engine.stats()["compilations"] == compiled


@pytest.mark.parametrize("case", by_day("mistral-window", "gpt-oss"), indirect=True)
def test_after_only_windows_chunks_or_states_were_evicted(case):
    case, folder = case
    # Full layers keep all; the others keep what one request needs.
    scarce = {"swa_full_tokens_ratio": 0.001, "page_size": 16, "chunked_prefill_size": 256, "max_running_requests": 1}
    scarce |= {"disable_kv_arena": True}
    if case.family == "mistral":  # it has windows alone: less of everything
        scarce |= {"max_total_tokens": 320, "context_length": 320}
    which = [12, 13, 14, 15]  # the longest
    with engine(folder, **scarce) as e:
        cold = ask(e, case, 1, which)
        again = ask(e, case, 1, which, most=24)
        evicted = {kind: tiers["DEVICE"]["evicted"] for kind, tiers in e.stats()["cache"].items()}
        assert evicted.pop("full", 0) == 0
        assert all(evicted.values())
        # Some resume where a window is still there, though all that the full layers need is.
        assert any(again[i] > cold[i] for i in which)
        assert any(again[i] < whole_pages(case, i, 16) for i in which)
        check_idle(e)


@pytest.mark.parametrize(
    ("name", "page_size", "chunk", "reuse"),
    [
        ("gpt-oss", 1, 16, True),
        ("llama4", 16, 64, False),
        pytest.param("gpt-oss", 16, 64, False, marks=pytest.mark.long),
        pytest.param("llama4", 1, 16, True, marks=pytest.mark.long),
    ],
)
def test_a_window_or_chunk_holds_what_its_rule_says(name, page_size, chunk, reuse, tmp_path):
    """A prompt of 150 tokens, then 20 windows' length: read from the allocator while each step has its slots.

    With reuse in an arena, where the request's pages are those of its row; without, in pools of their own, where
    nobody else has any, so that they are all that are not free.
    """
    case = golden(name)
    case.make(tmp_path)
    options = {"page_size": page_size, "chunked_prefill_size": chunk, "max_total_tokens": 2048}
    options |= {"disable_radix_cache": not reuse, "disable_kv_arena": not reuse}
    with engine(tmp_path, max_running_requests=1, **options) as e:
        cache, runner = e._parts.scheduler.cache, e._parts.runner
        windows = [kind for kind in cache.kinds if kind.rule != "full"]
        span, held, step = windows[0].span, [], runner.step

        def watched(batch, before=None):
            for kind in windows:
                (row,) = (row for row in cache.tables[kind.name] if row.any())
                pages, used = set(row[row != 0].tolist()), set(cache.used_pages(kind.name).tolist())
                assert pages <= used
                held.append(len(pages) if reuse else len(used))
            return step(batch, before)

        runner.step = watched
        new = 20 * span
        answer = e.generate(input_ids=(case.prompts[-1] * 2)[:150], sampling_params={**GREEDY, "max_new_tokens": new})
        assert answer["meta_info"]["completion_tokens"] == new
        assert len(held) >= new * len(windows)
        assert max(held) * page_size <= span + chunk + page_size
        check_idle(e)
