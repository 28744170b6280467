"""Steps that overlap, over real models of every kind of memory: the same answers, bit by bit, as without."""

import pytest
from machines import Callers, real_machine

from checkpoints import golden
from rootcellar.engine.commands import Abort
from rootcellar.engine.output import LogprobOptions
from rootcellar.runner import CompileCounter

NEW = 24


@pytest.fixture(scope="module", params=["qwen3", "gemma3", "bamba", "deepseek2-lite"])
def twins(request, tmp_path_factory):
    """One model twice: with steps that overlap and without. Attention; windows; recurrent states; latents."""
    case = golden(request.param)
    folder = case.make(tmp_path_factory.mktemp(request.param))
    options = {"max_total_tokens": 1024, "page_size": 4, "max_running_requests": 4, "chunked_prefill_size": 16}
    return case, [real_machine(folder, disable_overlap_schedule=off, **options) for off in (False, True)]


def served(machine, commands, after=None):
    """What callers get, and the steps after which each command was carried out.

    ``commands``: each with the number of tokens that were chosen before, at the least; ``after``: or, if given, after
    exactly so many steps.
    """
    callers = Callers(machine)
    first, generated, steps = machine.steps, machine.generated, []
    for i, (tokens, command) in enumerate(commands(callers)):
        while machine.ready:
            if machine.generated - generated >= tokens if after is None else machine.steps - first == after[i]:
                break
            callers.step()
        callers.do(command)
        steps.append(machine.steps - first)
    callers.run()
    found = {}
    for rid, updates in callers.updates.items():
        last = updates[-1].render()
        meta = last["meta_info"]
        kept = (
            "finish_reason",
            "cached_tokens",
            "output_token_logprobs",
            "output_top_logprobs",
            "input_token_logprobs",
        )
        found[rid] = {"tokens": last["output_ids"], **{key: meta.get(key) for key in kept}}
    return found, steps


def test_answers_and_logprobs_are_equal(twins):
    """Of four at once: greedy, drawn, with logprobs of all and of the prompt; a stop token in the middle of one."""
    case, machines = twins
    prompts = case.prompts[:4]
    stop = case.tokens[1][NEW // 2]

    def commands(callers):
        greedy = {"temperature": 0, "max_new_tokens": NEW}
        drawn = {"temperature": 1.0, "seed": 5, "max_new_tokens": NEW}
        logprobs = LogprobOptions(top=3, texts=False)
        whole = LogprobOptions(start=0, texts=False)
        yield 0, callers.submit([prompts[0]], 0, stop_ids=(), **greedy)
        yield 0, callers.submit([prompts[1]], 1, stop_ids=(stop,), logprobs=logprobs, **greedy)
        yield 9, callers.submit([prompts[2]], 2, stop_ids=(), logprobs=whole, **drawn)
        yield 20, callers.submit([prompts[3]], 3, stop_ids=(), min_new_tokens=3, **drawn)
        yield 1000, callers.submit(prompts, 4, stop_ids=(stop,), **drawn)  # again, from the cache

    overlapped, steps = served(machines[0], commands)
    plain, _ = served(machines[1], commands, steps)
    assert overlapped["c0-0"]["tokens"] == case.tokens[0][:NEW]
    assert overlapped["c1-0"]["finish_reason"] == {"type": "stop", "matched": stop}
    for rid, answer in plain.items():
        assert overlapped[rid] == answer, rid


def test_nothing_compiles_that_steps_without_overlap_had_not_compiled(twins):
    """After a first time, whatever comes before a step."""
    case, (machine, _) = twins

    def commands(callers):
        yield 0, callers.submit(case.prompts[:1], 0, stop_ids=(), temperature=0, max_new_tokens=8)
        yield 3, callers.submit(case.prompts[1:4], 1, stop_ids=(), temperature=0, max_new_tokens=8)

    served(machine, commands)
    counter = CompileCounter()
    served(machine, commands)
    assert counter.count == 0


def test_after_an_abort_and_a_retraction_the_others_go_on(twins):
    case, machines = twins

    def commands(callers):
        greedy = {"temperature": 0, "stop_ids": (), "max_new_tokens": NEW}
        yield 0, callers.submit(case.prompts[:2], 0, **greedy)
        yield 4, callers.submit([case.prompts[2]], 1, **greedy)
        yield 12, Abort("c0-1", None, "asked")
        yield 14, callers.submit([case.prompts[3]], 2, **greedy)

    for machine in machines:
        machine.scheduler.retract_all()
        found, _ = served(machine, commands)
        for rid, i in (("c0-0", 0), ("c1-0", 2), ("c2-0", 3)):
            assert found[rid]["tokens"] == case.tokens[i][:NEW]
        assert found["c0-1"]["tokens"] == case.tokens[1][: len(found["c0-1"]["tokens"])]
