"""Prefill and decode on two nodes: the tokens of one engine, no page sent that is there, and whoever goes away."""

import itertools
import threading

import pytest
from apart import two_nodes
from conversations import FAMILIES, HALF, LONG

from rootcellar.errors import ConfigError, RequestError
from rootcellar.plan.grids import NARROW
from rootcellar.transfer.faulty import FaultyWires, WireFaults

# Tokens of a prompt, and how many of them at least are cached: recurrent layers leave no state sooner.
SOME, LEAST = 40, 32


@pytest.fixture(scope="module")
def pair(case_of):
    """Two nodes of a model whose layers are all full attention, in the default pages."""
    with two_nodes(case_of("qwen2-4kv")[1], hicache_ratio=4.0, decode={"disaggregation_fallback": "abort"}) as pair:
        yield pair


@pytest.fixture
def nodes(pair):
    """Nothing is cached on either before, nor left behind on either after."""
    yield pair
    pair.check_idle()


def lacking(pair, prompt, there=0):
    """Pages that a decode node needs of a prompt beyond those ``there``, of all kinds."""
    cache = pair.decode._parts.scheduler.cache
    size = cache.page_size
    end = (len(prompt) - 1) // size
    if end <= there:
        return 0
    return sum(
        1 if kind.rule == "recurrent" else end - max(there, kind.start(end * size) // size) for kind in cache.kinds
    )


def settled(pair):
    for engine in (pair.prefill, pair.decode):
        engine._loop.call(engine._loop.machine.life.settle)


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_a_prompt_computed_on_one_node_is_answered_by_the_other(nodes, case_of, first):
    case, _ = case_of("qwen2-4kv")
    prompt, before = case.prompts[15], nodes.sent
    gave, answer = nodes.ask_both(prompt, HALF, first=first)
    assert answer["output_ids"] == case.tokens[15][:HALF]
    assert gave["output_ids"] == []
    assert gave["meta_info"]["finish_reason"]["type"] == "length"
    assert nodes.sent - before == lacking(nodes, prompt)
    assert answer["meta_info"]["cached_tokens"] == (len(prompt) - 1) // 16 * 16
    names = [[name for name, _ in each["meta_info"]["stages"]] for each in (gave, answer)]
    assert names[0] == [
        "TOKENIZE", "PREFILL_BOOTSTRAP", "PREFILL_WAITING", *names[0][3:-2], "PREFILL_TRANSFER_KV_CACHE", "FINISHED",
    ]  # fmt: skip
    assert [name for name in names[1] if name.startswith("DECODE_")] == [
        "DECODE_BOOTSTRAP", "DECODE_WAITING", "DECODE_TRANSFERRED", "DECODE_LOOP",
    ]  # fmt: skip
    assert nodes.decode.stats()["prefill_tokens"] <= 2 * 16, "what is left of a page"
    nodes.same_bytes(prompt, lacking(nodes, prompt))


def test_what_either_node_has_is_not_computed_or_not_sent_again(nodes, case_of):
    case, _ = case_of("qwen2-4kv")
    prompt, tokens = case.prompts[15], case.tokens[15]
    alone = {"temperature": 0, "max_new_tokens": HALF, "ignore_eos": True}
    # On the prefill side: it is sent at once.
    nodes.prefill.generate(input_ids=prompt, sampling_params=alone)
    before = nodes.sent
    gave, answer = nodes.ask_both(prompt, HALF)
    assert gave["meta_info"]["cached_tokens"] == (len(prompt) - 1) // 16 * 16
    assert answer["output_ids"] == tokens[:HALF]
    assert nodes.sent - before == lacking(nodes, prompt)
    # On both: nothing is.
    before = nodes.sent
    assert nodes.ask(prompt, HALF)["output_ids"] == tokens[:HALF]
    assert nodes.sent == before
    # The next turn: the decode side has its own answer beyond the prompt, the prefill side has not.
    longer = prompt + tokens[:HALF]
    there = (len(longer) - 1) // 16
    gave, answer = nodes.ask_both(longer, HALF)
    assert answer["output_ids"] == tokens[HALF:]
    assert nodes.sent == before
    assert there * 16 - 16 <= answer["meta_info"]["cached_tokens"] <= there * 16


def test_on_the_decode_side_alone_a_part_is_there_and_only_the_rest_is_sent(nodes, case_of):
    case, _ = case_of("qwen2-4kv")
    prompt, tokens = case.prompts[15], case.tokens[15]
    nodes.decode.generate(input_ids=prompt[:50], sampling_params={"temperature": 0, "max_new_tokens": 1})
    settled(nodes)
    before = nodes.sent
    assert nodes.ask(prompt, HALF)["output_ids"] == tokens[:HALF]
    assert nodes.sent - before == lacking(nodes, prompt, there=3)


def test_many_at_once_and_several_answers_to_one_prompt(nodes, case_of):
    case, _ = case_of("qwen2-4kv")
    prompts = [case.prompts[i] for i in range(16)]
    before = nodes.sent
    answers = nodes.ask(prompts, 8)
    for i, answer in enumerate(answers):
        assert answer["output_ids"] == case.tokens[i][:8]
    assert nodes.sent - before <= sum(lacking(nodes, prompt) for prompt in prompts)
    params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, "n": 3}
    answers = nodes.ask(case.prompts[15], 8, sampling_params=params)
    assert [answer["output_ids"] for answer in answers] == [case.tokens[15][:8]] * 3


def test_what_the_host_has_no_room_for_is_computed_at_once(nodes, case_of, monkeypatch):
    case, _ = case_of("qwen2-4kv")
    monkeypatch.setattr(type(nodes.decode._parts.scheduler.cache), "prefetch", lambda *_: None)
    before = nodes.sent
    answer = nodes.ask(case.prompts[15], 8, cache_salt="no room")
    assert answer["output_ids"] == case.tokens[15][:8]
    assert nodes.sent == before


@pytest.mark.parametrize("short", [1, 2, 16, 17])
def test_prompts_about_as_long_as_a_page(nodes, case_of, short):
    case, _ = case_of("qwen2-4kv")
    prompt = case.prompts[15][:short]
    alone = nodes.decode.generate(
        input_ids=prompt,
        cache_salt="alone",
        sampling_params={"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
    )
    before = nodes.sent
    assert nodes.ask(prompt, 4)["output_ids"] == alone["output_ids"]
    assert nodes.sent - before == (short - 1) // 16


def test_logprobs_and_streams_are_the_decode_nodes_own(nodes, case_of):
    case, _ = case_of("qwen2-4kv")
    prompt = case.prompts[14]
    wanted = {"return_logprob": True, "logprob_start_len": 20, "top_logprobs_num": 2}
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    alone = nodes.decode.generate(input_ids=prompt, cache_salt="alone", sampling_params=params, **wanted)
    answer = nodes.ask(prompt, 4, **wanted)
    for name in ("output_token_logprobs", "input_token_logprobs"):
        ours, theirs = answer["meta_info"][name], alone["meta_info"][name]
        assert [each[1] for each in ours] == [each[1] for each in theirs]
        assert [each[0] for each in ours if each[0]] == pytest.approx([each[0] for each in theirs if each[0]], abs=1e-4)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_abort_on_either_side_frees_both(nodes, case_of, side):
    case, _ = case_of("qwen2-4kv")
    other = {"prefill": "decode", "decode": "prefill"}[side]
    engines = {"prefill": nodes.prefill, "decode": nodes.decode}
    nodes.prefill.pause_generation("in_place")  # it joins, and computes nothing
    where, results = nodes.where(), {}
    params = {"temperature": 0, "max_new_tokens": 4}
    asked = {"input_ids": case.prompts[15], "sampling_params": params, "rid": "both", "raise_on_failure": False}

    def ask(name):
        results[name] = engines[name].generate(**asked, **where)

    threads = [threading.Thread(target=ask, args=(name,)) for name in engines]
    for thread in threads:
        thread.start()
    until(lambda: stages(nodes.decode) == ["DECODE_WAITING"] and stages(nodes.prefill) == ["PREFILL_WAITING"])
    assert engines[side].abort_request("both") == 1
    for thread in threads:
        thread.join()
    nodes.prefill.continue_generation()
    ends = {name: results[name]["meta_info"]["finish_reason"] for name in engines}
    assert ends[side]["message"] == "aborted by abort_request"
    assert ends[other]["type"] == "abort"
    assert ("gave it up" if other == "decode" else "decode node is gone") in ends[other]["message"]
    assert nodes.ask(case.prompts[15], 4)["output_ids"] == case.tokens[15][:4]


def test_a_room_is_used_once_at_a_time(nodes, case_of):
    case, _ = case_of("qwen2-4kv")
    where = nodes.where()
    waiting = nodes.prefill.generate(input_ids=case.prompts[15], stream=True, **where)
    with pytest.raises(RequestError, match=f"bootstrap_room {where['bootstrap_room']} is in use"):
        nodes.prefill.generate(input_ids=case.prompts[14], **where)
    rooms = {**where, "bootstrap_room": [3, 3]}
    with pytest.raises(RequestError, match="bootstrap_room 3 is in use"):
        nodes.prefill.generate(input_ids=[[1], [2]], **rooms)
    waiting.close()
    nodes.prefill.abort_all()


def test_what_routers_say_is_checked(nodes):
    where = nodes.where()
    for wrong, said in (
        ({"bootstrap_room": -1}, "bootstrap_room='-1'"),
        ({"bootstrap_room": 2**63}, "bootstrap_room="),
        ({"bootstrap_room": True}, "bootstrap_room="),
        ({"bootstrap_room": [1, 2]}, "a list of 1"),
        ({"bootstrap_port": 0}, "bootstrap_port="),
        ({"bootstrap_host": ""}, "bootstrap_host="),
        ({"bootstrap_host": None}, "needs bootstrap_host"),
        ({"storage_checkpoint_dependency": "a"}, "give one"),
    ):
        with pytest.raises(RequestError, match=said):
            nodes.decode.generate(input_ids=[1], **{**where, **wrong})


def test_one_engine_meets_nobody(tiny_engine):
    with pytest.raises(RequestError, match="start with disaggregation_mode"):
        tiny_engine.generate(input_ids=[1], bootstrap_host="127.0.0.1", bootstrap_room=1)


@pytest.mark.parametrize(
    ("name", "page", "chunk", "rows"),
    [
        ("gemma3", 16, 16, 2),
        ("qwen3-next", 16, 64, 2),
        *(pytest.param(*each, 16, marks=pytest.mark.long) for each in itertools.product(FAMILIES, (1, 16), (16, 256))),
    ],
)
def test_every_family_cold_cached_and_a_turn_later(case_of, name, page, chunk, rows):
    case, folder = case_of(name)
    options = {"page_size": page, "chunked_prefill_size": chunk, "max_total_tokens": 512 if rows == 2 else 2048}
    with two_nodes(folder, hicache_ratio=4.0, max_running_requests=rows, **options) as pair:
        for i in LONG:  # each by itself: some begin alike
            before = pair.sent
            assert pair.ask(case.prompts[i], HALF, cache_salt=str(i))["output_ids"] == case.tokens[i][:HALF]
            assert pair.sent - before == lacking(pair, case.prompts[i])
        pair.same_bytes(case.prompts[i], 1, salt=str(i))
        alone = {"temperature": 0, "max_new_tokens": 1}
        for node in (pair.prefill, pair.decode):  # a part of each prompt is cached there, and nothing on the other
            salt = node._parts.config.disaggregation_mode
            for i in LONG:
                prompt, before = case.prompts[i], pair.sent
                node.generate(input_ids=prompt[:SOME], sampling_params=alone, cache_salt=f"{salt} {i}")
                settled(pair)
                gave, answer = pair.ask_both(prompt, HALF, cache_salt=f"{salt} {i}")
                assert answer["output_ids"] == case.tokens[i][:HALF]
                part = min(SOME, len(prompt) - 1)
                if node is pair.prefill:
                    assert LEAST <= gave["meta_info"]["cached_tokens"] <= part
                    assert pair.sent - before == lacking(pair, prompt)
                else:
                    there = range(LEAST // page, part // page + 1)
                    assert pair.sent - before in {lacking(pair, prompt, end) for end in there}
        if rows == 16:
            everything = pair.ask(case.prompts, HALF, cache_salt="all at once")
            assert [answer["output_ids"] for answer in everything] == [tokens[:HALF] for tokens in case.tokens]
        prompts = [case.prompts[i] for i in LONG]
        for again in (False, True):
            before = pair.sent
            answers = pair.ask(prompts, HALF)
            assert [answer["output_ids"] for answer in answers] == [case.tokens[i][:HALF] for i in LONG]
            assert (pair.sent == before) == again, "what is there is not sent again"
        longer = [case.prompts[i] + case.tokens[i][:HALF] for i in LONG]
        assert [answer["output_ids"] for answer in pair.ask(longer, HALF)] == [case.tokens[i][HALF:] for i in LONG]
        pair.check_idle()


@pytest.mark.parametrize("reserved", [0, 512])
def test_who_is_retracted_comes_back_without_prefill_and_who_runs_is_not_retracted(case_of, reserved):
    """Answers of two prompts of a hundred tokens, on a device that has not the room for both to their ends."""
    case, folder = case_of("qwen2-4kv")
    decode = {"max_total_tokens": 272, "num_reserved_decode_tokens": reserved}
    with two_nodes(folder, hicache_ratio=8.0, decode=decode) as pair:
        most = 2 * HALF
        prompts = [case.prompts[15], case.prompts[15][::-1]]
        params = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
        alone = pair.prefill.generate(input_ids=prompts[1], sampling_params=params)["output_ids"]
        answers = pair.ask(prompts, most, cache_salt="both")
        assert [answer["output_ids"] for answer in answers] == [case.tokens[15][:most], alone]
        stats = pair.decode.stats()
        assert (stats["retractions"] > 0) == (reserved == 0)
        computed = stats["prefill_tokens"]
        assert computed <= (2 + stats["retractions"]) * 2 * 16, "what is left of pages"
        pair.check_idle()


@pytest.mark.parametrize(
    ("kv", "backend"),
    [("auto", "xla"), ("fp8_e4m3", "xla"), *(pytest.param(kv, "auto", marks=pytest.mark.long) for kv in NARROW)],
)
def test_nodes_of_unlike_attention_and_cached_in_few_bits(case_of, kv, backend):
    case, folder = case_of("qwen2-4kv")
    with two_nodes(folder, kv_cache_dtype=kv, prefill={"attention_backend": backend}) as pair:
        alone = {"temperature": 0, "max_new_tokens": HALF, "ignore_eos": True}
        expected = pair.prefill.generate(input_ids=case.prompts[15], sampling_params=alone, cache_salt="alone")
        before = pair.sent
        answer = pair.ask(case.prompts[15], HALF)
        alike = HALF if backend == "auto" else 8
        assert answer["output_ids"][:alike] == expected["output_ids"][:alike]
        pair.same_bytes(case.prompts[15], 1)
        assert kv != "auto" or answer["output_ids"] == case.tokens[15][:HALF]
        assert pair.sent - before == lacking(pair, case.prompts[15])
        pair.check_idle()


def test_nodes_that_are_not_alike_refuse_with_both_values(case_of):
    case, folder = case_of("qwen2-4kv")
    with two_nodes(folder, decode={"page_size": 8}) as pair:
        where = pair.where()
        answer = pair.decode.generate(input_ids=case.prompts[15], raise_on_failure=False, **where)
        message = answer["meta_info"]["finish_reason"]["message"]
        assert "page_size is 8 on the decode node and 16 on the prefill node" in message
        pair.check_idle()


@pytest.mark.parametrize(
    ("fallback", "seed"),
    [
        ("abort", 1),
        ("recompute", 1),
        *(
            pytest.param(fallback, seed, marks=pytest.mark.long)
            for fallback, seed in itertools.product(("abort", "recompute"), range(2, 15))
        ),
    ],
)
def test_whatever_the_wire_does_no_token_is_wrong_and_the_next_request_works(case_of, fallback, seed):
    case, folder = case_of("qwen2-4kv")
    faults = WireFaults(delay=0.05, cut=0.02, corrupt=0.02, hang=0.004)
    options = {"disaggregation_heartbeat_timeout": 0.5, "disaggregation_waiting_timeout": 3.0}
    with two_nodes(folder, decode={"disaggregation_fallback": fallback}, **options) as pair:
        wires = [FaultyWires(faults, 2 * seed + side) for side in (0, 1)]
        pair.prefill._parts.peers._wrap, pair.decode._parts.peers._wrap = wires
        failed = 0
        for turn in range(12):
            i = LONG[turn % len(LONG)]
            answer = pair.ask(case.prompts[i], 8, first=("prefill", "decode")[turn % 2], cache_salt=str(turn))
            reason = answer["meta_info"]["finish_reason"]
            if reason["type"] == "abort":
                failed += 1
                assert reason["message"].startswith("the prefill node at 127.0.0.1:"), reason
            else:
                assert answer["output_ids"] == case.tokens[i][:8]
        assert sum(wire.seen[fault] for wire in wires for fault in ("cut", "corrupt", "hang"))
        assert not (failed and fallback == "recompute")
        for peers in (pair.prefill._parts.peers, pair.decode._parts.peers):
            peers._wrap = lambda plain: plain
        assert pair.ask(case.prompts[15], 8)["output_ids"] == case.tokens[15][:8]
        pair.check_idle()


@pytest.mark.parametrize("fallback", ["abort", "recompute"])
def test_a_prefill_node_that_ends_meanwhile(case_of, fallback):
    case, folder = case_of("qwen2-4kv")
    with two_nodes(folder, decode={"disaggregation_fallback": fallback}) as pair:
        pair.prefill.pause_generation("in_place")
        where, results = pair.where(), []
        params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        asked = {"input_ids": case.prompts[15], "sampling_params": params, "raise_on_failure": False, **where}
        threads = [
            threading.Thread(target=lambda engine=engine: results.append((engine, engine.generate(**asked))))
            for engine in (pair.prefill, pair.decode)
        ]
        for thread in threads:
            thread.start()
        until(lambda: stages(pair.decode) == ["DECODE_WAITING"])
        pair.prefill.shutdown()
        for thread in threads:
            thread.join()
        (answer,) = [result for engine, result in results if engine is pair.decode]
        if fallback == "abort":
            assert "is lost" in answer["meta_info"]["finish_reason"]["message"]
        else:
            assert answer["output_ids"] == case.tokens[15][:8]
        again = pair.decode.generate(**asked)
        assert (again["meta_info"]["finish_reason"]["type"] == "abort") == (fallback == "abort")


def test_after_one_that_does_not_fit_another_is_waited_for_and_no_longer_than_a_dead_one(case_of):
    case, folder = case_of("qwen2-4kv")
    with two_nodes(folder, disaggregation_heartbeat_timeout=3.0) as pair:
        params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        ends = []
        for comes in (True, False):
            where = pair.where()
            asked = {"sampling_params": params, "raise_on_failure": False, **where}
            waiting = pair.prefill.generate(input_ids=case.prompts[15], stream=True, **asked)
            other = pair.decode.generate(input_ids=case.prompts[14], **asked)
            assert "the prompts in room" in other["meta_info"]["finish_reason"]["message"]
            if comes:
                assert pair.decode.generate(input_ids=case.prompts[15], **asked)["output_ids"] == case.tokens[15][:4]
            ends.append(list(waiting)[-1]["meta_info"]["finish_reason"])
        assert ends[0]["type"] == "length"
        assert "the last one was refused: the prompts in room" in ends[1]["message"]
        pair.check_idle()


def test_whoever_waits_too_long_is_told(case_of):
    case, folder = case_of("qwen2-4kv")
    with two_nodes(folder, disaggregation_waiting_timeout=0.2) as pair:
        for engine, said in ((pair.prefill, "no decode node came"), (pair.decode, "did not come within 0.2 s")):
            answer = engine.generate(input_ids=case.prompts[15], raise_on_failure=False, **pair.where())
            assert said in answer["meta_info"]["finish_reason"]["message"]
        pair.check_idle()


def test_a_step_that_fails_ends_what_was_offered_and_nothing_else(case_of, monkeypatch):
    case, folder = case_of("qwen2-4kv")
    with two_nodes(folder, chunked_prefill_size=32) as pair:
        runner = pair.prefill._parts.runner
        step, steps = runner.step, itertools.count()

        def breaks(*arguments):
            if next(steps) == 1:  # the second chunk: the first was offered
                raise RuntimeError("the device is on fire")
            return step(*arguments)

        monkeypatch.setattr(runner, "step", breaks)
        gave, answer = pair.ask_both(case.prompts[15], 8)
        assert "on fire" in gave["meta_info"]["finish_reason"]["message"]
        assert "on fire" in answer["meta_info"]["finish_reason"]["message"]
        assert pair.ask(case.prompts[15], 8)["output_ids"] == case.tokens[15][:8]
        pair.check_idle()


def test_a_prompts_first_chunks_have_come_when_its_last_one_is_computed(case_of, monkeypatch):
    case, folder = case_of("qwen2-4kv")
    with two_nodes(folder, chunked_prefill_size=32) as pair:
        # Three chunks and a half, seven whole pages: six of them can be there before the last chunk is computed.
        prompt, peers = (case.prompts[15] + case.tokens[15])[:120], pair.decode._parts.peers
        params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        alone = pair.decode.generate(input_ids=prompt, cache_salt="alone", sampling_params=params)
        runner = pair.prefill._parts.runner
        step, steps, come = runner.step, itertools.count(1), []

        def compute(*arguments):
            number = next(steps)
            if number > 1:  # what the chunks before it left comes while it computes
                until(lambda: peers.stats.pages >= 2 * (number - 1))
            come.append(peers.stats.pages)
            return step(*arguments)

        monkeypatch.setattr(runner, "step", compute)
        assert pair.ask(prompt, 8)["output_ids"] == alone["output_ids"]
        assert come == [0, 2, 4, 6]
        assert pair.sent == lacking(pair, prompt) == 7
        pair.check_idle()


def test_of_a_conversation_each_node_has_the_turns_before_from_their_store(case_of, tmp_path):
    case, folder = case_of("qwen2-4kv")
    extra = {"path": str(tmp_path), "prefetch_threshold": 16}
    with two_nodes(folder, hicache_ratio=4.0) as pair:
        # One writes, which is the one that has all of a conversation.
        pair.decode.attach_storage("file", extra)
        pair.prefill.attach_storage("file", {**extra, "read_only": True}, prefetch_policy="wait_complete")
        said = list(case.prompts[13])
        for turn in range(4):
            gave, answer = pair.ask_both(said, HALF)
            computed = gave["meta_info"]["prompt_tokens"] - gave["meta_info"]["cached_tokens"]
            assert computed <= (len(said) if turn == 0 else 12 + 2 * 16), "the new turn, and what is left of pages"
            settled(pair)  # what was said is written down, and found by the next turn's prefill
            said += answer["output_ids"] + case.prompts[11 + turn % 3][:12]
        pair.check_idle()


def test_settings_that_do_not_go_together_are_refused(tiny_folder):
    import rootcellar

    for mode in ("prefill", "decode"):
        with pytest.raises(ConfigError, match="needs the radix cache"):
            rootcellar.Engine(model_path=tiny_folder, disaggregation_mode=mode, disable_radix_cache=True)


def stages(engine):
    return [name for name, count in engine.stats()["stages"].items() for _ in range(count)]


def until(condition):
    """Wait until it holds; who changes it is another engine's thread."""
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("waited in vain")
