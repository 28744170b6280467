"""Stop strings: against the obvious, over special tokens, and streamed as whole."""

import random
import time

import pytest

import rootcellar
from rootcellar.engine.stops import Automaton, Search
from rootcellar.errors import RequestError


def _obvious(pieces, stops, least):
    """(text up to the stop string, the stop string) by looking at every place of the whole text.

    ``pieces``: (text, shown) of each token; what ends within the first ``least - 1`` tokens does not count.
    """
    read = [(character, shown, i + 1) for i, (text, shown) in enumerate(pieces) for character in text]
    whole = "".join(character for character, _, _ in read)
    for end in range(1, len(read) + 1):
        ending = [stop for stop in stops if whole[:end].endswith(stop)]
        if ending and read[end - 1][2] >= least:
            stop = max(ending, key=len)
            return "".join(c for c, shown, _ in read[: end - len(stop)] if shown), stop
    return "".join(c for c, shown, _ in read if shown), None


def _searched(pieces, stops, least):
    """The same by ``Search``, token by token, and what a stream shows meanwhile."""
    search = Search(stops, {7: "<S>"})
    text, shown = "", [""]
    for i, (piece, seen) in enumerate(pieces):
        text += piece if seen else ""
        found = search.read(piece, shown=seen, counts=i + 1 >= least)
        if found is not None:
            return text[: found.start], found.stop, shown
        shown.append(text[: len(text) - search.held])
    return text, None, shown


def test_search_against_the_obvious():
    rng = random.Random(5)
    found = 0
    for _ in range(4000):
        alphabet = "ab" if rng.random() < 0.7 else "abc<S>"
        stops = tuple({"".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 5))})
        if rng.random() < 0.3:
            stops = (*stops, rng.choice(["<S>", "a<S>", "<S>b", "b<S>a"]))
        special = any("<S>" in stop for stop in stops)
        pieces = [
            ("<S>", False)
            if special and rng.random() < 0.1
            else ("".join(rng.choices(alphabet, k=rng.randint(0, 4))), True)
            for _ in range(rng.randint(1, 12))
        ]
        least = rng.randint(0, 8)
        text, stop, shown = _searched(pieces, stops, least)
        assert (text, stop) == _obvious(pieces, stops, least), (pieces, stops, least)
        # What was shown once stays, and the whole begins with it.
        assert all(later.startswith(earlier) for earlier, later in zip(shown, [*shown[1:], text], strict=True))
        found += stop is not None
    assert 1000 < found < 3900


def test_only_what_may_become_a_stop_string_is_held_back():
    automaton = Automaton(("ab", "bcd"))
    state, held = 0, []
    for character in "aabcbcda":
        state = automaton.step(state, character)
        held.append(automaton.pending[state])
    assert held == [1, 1, 1, 2, 1, 2, 0, 1]


def test_the_number_of_stop_strings_costs_nothing_a_character():
    """One pass whatever their number: five thousand take about as long as ten."""

    def seconds(n):
        search = Search(tuple(f"{i:05d}" for i in range(n)), {})
        started = time.thread_time()
        for _ in range(20_000):
            search.read("00000x")
            search.read("abcdef")
        return time.thread_time() - started

    seconds(10)
    assert seconds(5_000) < 10 * seconds(10)


PROMPT = "What is a page?"


@pytest.fixture(scope="module")
def demo():
    with rootcellar.Engine(model_path="demo", max_total_tokens=2048, max_running_requests=8) as engine:
        yield engine


def _streamed(engine, **params):
    """The text of a stream, piece by piece: it only ever grows."""
    text = ""
    for result in engine.generate(prompt=PROMPT, sampling_params=params, stream=True):
        assert result["text"].startswith(text)
        text = result["text"]
    return text, result["meta_info"]["finish_reason"]


@pytest.mark.parametrize("least", [0, 1, 5, 10, 20, 24])
@pytest.mark.parametrize("stops", [(" ",), ("e", "s"), (" a", "is", "the"), ("zzzz",)])
@pytest.mark.parametrize("keep", [False, True])
def test_streamed_is_whole_and_stops_before_min_tokens_do_not_count(demo, least, stops, keep):
    base = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    params = {**base, "stop": list(stops), "min_new_tokens": least, "no_stop_trim": keep}
    whole = demo.generate(prompt=PROMPT, sampling_params=params)
    assert _streamed(demo, **params) == (whole["text"], whole["meta_info"]["finish_reason"])
    # Token by token, as if there were no stop strings.
    ids = demo.generate(prompt=PROMPT, sampling_params=base)["output_ids"]
    detokenizer = demo.tokenizer.detokenizer()
    pieces = [(detokenizer.add([id]), True) for id in ids]
    text, stop = _obvious(pieces, stops, least)
    assert whole["text"] == (text + stop if keep and stop else text)
    assert whole["meta_info"]["finish_reason"].get("matched") == stop


def test_special_tokens_match_although_the_text_leaves_them_out(demo):
    (id, text), *_ = sorted(demo.tokenizer.skipped.items())
    start = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    forced = {**start, "logit_bias": {id: 100}}
    alone = demo.generate(prompt=PROMPT, sampling_params=forced)
    assert id in alone["output_ids"]
    for stop in ([text], ["never", text]):
        result = demo.generate(prompt=PROMPT, sampling_params={**forced, "stop": stop})
        at = alone["output_ids"].index(id)
        assert result["output_ids"] == alone["output_ids"][: at + 1]
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": text}
        assert text not in result["text"]
    # Where special tokens are shown, it is text like any other.
    shown = demo.generate(prompt=PROMPT, sampling_params={**forced, "stop": [text], "skip_special_tokens": False})
    assert shown["output_ids"] == result["output_ids"]
    assert text not in shown["text"]
    # A stop string that only looks like part of one does not match it.
    part = demo.generate(prompt=PROMPT, sampling_params={**forced, "stop": [text[1:-1]]})
    assert part["meta_info"]["finish_reason"]["type"] == "length"


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ([f"{i}" for i in range(100_000)], r"100000 stop strings.*max_stop_strings"),
        (["x" * 20_000], r"20000 characters.*max_stop_length"),
        ("y" * 20_000, r"20000 characters.*max_stop_length"),
    ],
)
def test_too_many_stop_strings_are_refused_at_once(demo, stop, said):
    with pytest.raises(RequestError, match=said):
        demo.generate(prompt=["hi"] * 64, sampling_params={"stop": stop, "max_new_tokens": 2})
    each = [{"stop": [f"{i}-{'z' * 200}"]} for i in range(100)]
    with pytest.raises(RequestError, match="max_stop_length"):
        demo.generate(prompt=["hi"] * 100, sampling_params=each)
