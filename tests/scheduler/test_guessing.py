"""What is guessed of a request's next tokens, and how much of it pays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootcellar.cache import Suffixes
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import NgramGuesser, Request, keep
from rootcellar.scheduler.guessing import Prices, repetition, shares
from rootcellar.scheduler.request import NOTHING


def text(tokens):
    return np.asarray(tokens, np.int64)


def request(tokens, most=100, cached=None, **options):
    made = Request.new("r", text(tokens), SamplingParams(max_new_tokens=most), **options)
    made.cached = cached
    return made


FREE = tuple((size, 1.0) for size in (1, 2, 4, 8))


def guesser(most=4, rows=8, prices=FREE, suffixes=None, least=2):
    made = NgramGuesser(suffixes, most=most, least=least, longest=8, rows=rows)
    for size, seconds in prices:
        made.took(size, seconds)
        made.took(size, seconds)
    return made


# -- what is found ----------------------------------------------------------------------------------------------------


def by_hand(ids, least, longest, most):
    """The same, one place after the other."""
    best = 0, None
    for end in range(len(ids) - 1):
        matched = 0
        while matched < min(longest, end + 1) and ids[end - matched] == ids[len(ids) - 1 - matched]:
            matched += 1
        if matched >= max(least, best[0]):
            best = matched, end
    if best[1] is None or most < 1:
        return NOTHING
    said = list(ids)
    for i in range(most):
        said.append(said[best[1] + 1 + i])
    return best[0], tuple(said[len(ids) :])


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 3), st.integers(0, 6), st.integers(0, 9))
def test_what_followed_the_longest_newest_repetition(ids, least, more, most):
    assert repetition(text(ids), least, least + more, most) == by_hand(ids, least, least + more, most)


def test_a_guess_is_kept_up_to_its_first_wrong_token_and_one_more():
    assert keep((), [4]) == [4]
    assert keep((1, 2, 3), [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert keep((1, 2, 3), [1, 9, 3, 4]) == [1, 9]
    assert keep((1, 2, 3), [9, 2, 3, 4]) == [9]


# -- how much pays ----------------------------------------------------------------------------------------------------


def test_as_much_is_guessed_as_makes_tokens_come_faster():
    free = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}
    dear = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}
    steep = {1: 1.0, 2: 1.0, 4: 1.2, 8: 8.0}
    assert shares([[0.9] * 7], 8, free.get) == [7]
    assert shares([[0.9] * 7], 8, dear.get) == [0]
    assert shares([[0.9] * 7], 8, steep.get) == [3]
    assert shares([[0.9]], 2, {1: 1.0, 2: 1.85}.get) == [0], "three in a hundred are less than is known"
    assert shares([[0.9]], 2, {1: 1.0, 2: 1.75}.get) == [1]
    assert shares([[0.9] * 2], 8, steep.get) == [2], "there are no more"
    assert shares([[0.9] * 7, [0.1] * 7], 4, free.get) == [2, 0], "the likeliest first"
    assert shares([[0.3, 0.9, 0.9], [0.4, 0.5]], 4, free.get) == [1, 1], "0.4, 0.3, then 0.27 before 0.2"
    assert shares([[0.3, 0.9, 0.9], [0.4, 0.5]], 8, free.get) == [3, 2]
    assert shares([[0.5] * 7] * 3, 4, dear.get) == [1, 0, 0], "the step is padded to four rows anyway"
    assert shares([[]] * 4, 8, free.get) == [0] * 4
    assert shares([[0.9]], 2, free.get, alone=0.5) == [0], (
        "without it the step is planned ahead, and takes half the time"
    )


def test_a_price_is_the_median_of_what_steps_took_and_the_first_may_compile():
    prices = Prices()
    assert prices.of(4) == 1.25**2
    prices.took(2, 0.5)
    prices.took(4, 60.0)
    prices.took(2, 0.5)
    assert prices.of(4) == 0.625, "a little more than the size below, until it is known"
    prices.took(4, 0.7)
    assert prices.of(4) == 0.7
    for seconds in (0.9, 0.9, 0.8):
        prices.took(4, seconds)
    assert prices.of(4) == 0.9
    assert prices.of(1) == 0.5 / 1.25, "a little less than the size above, where none below is known"


def test_steps_planned_ahead_have_prices_of_their_own():
    prices = Prices()
    for _ in range(2):
        prices.took(4, 0.5, ahead=True)
    assert (prices.of(4, ahead=True), prices.of(4), prices.of(8)) == (0.5, 0.5, 0.625), "that is all there is"
    for _ in range(2):
        prices.took(4, 0.6)
    assert (prices.of(4, ahead=True), prices.of(4), prices.of(8)) == (0.5, 0.6, 0.75)
    for _ in range(2):
        prices.took(8, 0.7)
    assert prices.of(8, ahead=True) == 0.7


def test_a_price_that_is_not_paid_for_long_is_forgotten():
    """It was that of longer contexts, say: where a guess is likely, the step is tried again."""
    prices = Prices()
    for rows in (8, 8, *[1] * 511):
        prices.took(rows, rows / 2)
    assert prices.of(8) == 4
    prices.took(1, 0.5)
    assert prices.of(8) == 0.5 * 1.25**3
    prices.took(8, 4)
    assert prices.of(8) == 0.5 * 1.25**3, "that may have compiled"
    prices.took(8, 2)
    assert prices.of(8) == 2


def test_nothing_is_looked_for_where_no_step_could_pay():
    looked = request([1, 2, 3, 1, 2])
    assert guesser(prices=[(1, 1.0), (2, 2.0), (4, 4.0), (8, 8.0)]).of([looked]) == [()]
    assert looked.guessed.found == NOTHING
    assert guesser().of([looked]) == [(3, 1, 2, 3)]
    assert looked.guessed.found.matched == 2


RISING = ((1, 1.0), (2, 1.3), (4, 1.5), (8, 1.7))


def tried(made, asked, said):
    """What is guessed before each of the tokens that a request says, as if one were verified a step."""
    guesses = []
    for token in said:
        guesses += made.of([asked])
        made.verified(asked, len(guesses[-1]), int(guesses[-1][:1] == (token,)))
        asked.append(token)
    return guesses


def test_whoever_guesses_wrong_stops():
    made, asked = guesser(prices=RISING), request([1, 2, 3, 4, 1, 2], most=3000)
    guesses = tried(made, asked, [token for i in range(900) for token in (10 + i, 1, 2)])
    wrong = [guess for guess in guesses if guess]
    assert 0 < len(wrong) < 20, "what two tokens promise is soon known, and nothing is paid for it later"
    assert not any(guesses[100:])
    assert (asked.guessed.steps, asked.guessed.accepted) == (2700, 0)


def test_what_begins_to_be_right_is_noticed_though_nothing_was_tried():
    made, asked = guesser(prices=RISING), request([1, 2, 3, 4, 1, 2], most=3000)
    tried(made, asked, [token for i in range(300) for token in (10 + i, 1, 2)])
    guesses = tried(made, asked, [5, 6, 7, 8, 9, 10, 11, 12] * 8)
    assert not any(guesses[:9]), "it says something new"
    assert all(len(guess) > 1 for guess in guesses[30:])


def test_whoever_guesses_right_guesses_more():
    made = guesser(most=7, prices=[(1, 1.0), (2, 1.4), (4, 1.9), (8, 2.8)])
    asked = request([*range(1, 10), 1, 2])
    guesses = tried(made, asked, [*range(3, 10), *range(1, 10)] * 3)
    assert len(guesses[0]) < 7
    assert len(guesses[-1]) == 7


def test_of_a_request_that_is_wrong_where_others_are_right_nothing_is_guessed():
    """Two tokens match again and again; what came after them comes for the one, and never for the other."""
    made, threes = guesser(most=1, prices=[(1, 1.0), (2, 1.2)]), [(i, i + 1, i + 2) for i in range(100, 400, 3)]
    right, wrong = (request([token for three in threes for token in three], most=3000) for _ in range(2))
    for first, second, third in threes[:0:-1]:
        tried(made, right, [first, second, third])
        tried(made, wrong, [first, second, third + 1000])
    for asked, guess in ((right, (102,)), (wrong, ())):
        tried(made, asked, threes[0][:2])
        assert made.of([asked]) == [guess]


# -- who waits for it -------------------------------------------------------------------------------------------------


def test_a_step_waits_where_what_follows_the_newest_token_may_be_guessed():
    made = guesser(prices=RISING)
    assert not made.worth_waiting([request([1, 2, 3, 4])]), "nothing repeats"
    assert made.worth_waiting([request([1, 2, 3, 4] * 5)])
    assert not made.worth_waiting([request([1, 2, 3, 4] * 5, most=2)]), "behind the newest there is only the last"
    for _ in range(5):
        made.took(1, 0.2, ahead=True)
    assert not made.worth_waiting([request([1, 2, 3, 4] * 5)]), "five planned ahead take as long"


def test_what_was_found_is_found_once():
    """A step is asked for twice: whether to wait, and when the newest tokens are known."""
    made, asked = guesser(prices=RISING), request([1, 2, 3, 4] * 5)
    assert made.worth_waiting([asked])
    found = asked.guessed.found
    (guess,) = made.of([asked])
    assert asked.guessed.found is found
    assert found.tokens[: len(guess)] == guess


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (request([1, 2, 3, 1, 2], most=3), 2),  # with its last token there is nothing behind the newest
        (request([1, 2, 3, 1, 2], most=1), 0),
        (request([1, 2, 3, 1, 2], guessable=False), 0),
        (request([1, 2, 3, 4]), 0),
    ],
    ids=["nearly at its end", "at its end", "by a grammar", "nothing repeats"],
)
def test_what_may_be_guessed(asked, found):
    ((guess),) = guesser().of([asked])
    assert len(guess) == found


# -- what others said -------------------------------------------------------------------------------------------------


def test_what_others_of_its_namespace_said_is_guessed_once_they_ended():
    made = guesser(suffixes=Suffixes(1000, 8, 8))
    said = request([1, 2, 3, 4, 5, 6, 7, 8], cached=0)
    made.ended(said)
    assert made.of([request([2, 3, 4, 5])]) == [(6, 7, 8)]
    assert made.of([request([2, 3, 4, 5], namespace="other")]) == [()]
    assert made.of([request([2, 3, 4, 5], tenant="other")]) == [()], "though what is cached may be shared"
    assert made.of([request([2, 3, 4, 5, 9, 4, 5])]) == [(9, 4, 5, 9)], "its own text agrees with as much"
    made.forget()
    assert made.of([request([2, 3, 4, 5])]) == [()]


def test_what_others_said_is_guessed_where_as_much_matches_as_in_its_own_text():
    made = guesser(suffixes=Suffixes(1000, 8, 8), least=6)
    made.ended(request(range(1, 20), cached=0))
    assert made.of([request([70, 71, 4, 5, 6, 7])]) == [()], "four are not six"
    assert made.of([request([70, 2, 3, 4, 5, 6, 7])]) == [(8, 9, 10, 11)]


def test_of_a_prompt_that_was_cached_only_the_rest_is_added():
    suffixes = Suffixes(1000, 8, 8)
    made = guesser(suffixes=suffixes)
    made.ended(request(range(100), cached=90))
    assert made.of([request([79, 80, 81, 82, 83])]) == [()]
    assert made.of([request([86, 87, 88, 89])]) == [(90, 91, 92, 93)]
    made.ended(request([500, 501, 502, 503, 504, 505], cached=None))
    assert made.of([request([500, 501, 502, 503])]) == [()], "it never ran"
