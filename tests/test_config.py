"""EngineConfig and SamplingParams: what is accepted, what is refused, and what the refusal says."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootcellar import config_page, options
from rootcellar.config import EngineConfig
from rootcellar.errors import ConfigError, RequestError
from rootcellar.sampling_params import MAX_SEED, SamplingParams

ROOT = Path(__file__).parents[1]

# A busy machine makes single examples slow; that is no fault of what is tested.
unhurried = settings(deadline=None)


# --- EngineConfig -----------------------------------------------------------------------------------------------------


def test_defaults_are_allowed_and_given_values_are_kept():
    settings = EngineConfig.from_kwargs(page_size=4, model_path=Path("some/folder"), request_timeout=3)
    assert settings.page_size == 4
    assert settings.model_path == "some/folder"
    assert settings.request_timeout == 3.0
    assert isinstance(settings.request_timeout, float)
    assert settings == dataclasses.replace(EngineConfig(), page_size=4, model_path="some/folder", request_timeout=3.0)


def test_numpy_scalars_become_plain_numbers():
    page_size = EngineConfig(page_size=np.int64(8)).page_size
    assert page_size == 8
    assert type(page_size) is int


def test_an_unknown_name_is_refused_with_the_closest_and_the_list():
    with pytest.raises(ConfigError, match=r"'page_sise'.*Did you mean 'page_size'\?.*max_total_tokens") as caught:
        EngineConfig.from_kwargs(page_sise=16)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_name_with_nothing_near_suggests_nothing():
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_kwargs(zzzz=16)
    assert "mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("page_size", 0, "an integer at least 1"),
        ("page_size", True, "an integer at least 1"),
        ("page_size", 16.0, "an integer at least 1"),
        ("page_size", "16", "an integer at least 1"),
        ("page_size", None, "an integer at least 1"),
        ("chunked_prefill_size", -1, "an integer at least 1"),
        ("context_length", 0, "an integer at least 1, or None"),
        ("request_timeout", 0, "a number above 0, or None"),
        ("request_timeout", math.inf, "a number above 0, or None"),
        ("random_seed", MAX_SEED + 1, "an integer in [0, 4294967295]"),
        ("random_seed", 10**400, "an integer in [0, 4294967295]"),
        ("schedule_policy", "LPM", "one of 'lpm', 'fcfs'. Did you mean 'lpm'?"),
        ("disable_radix_cache", 1, "true or false"),
        ("model_path", "", "a non-empty string"),
        ("model_path", 3, "a non-empty string"),
        ("load_format", Path("auto"), "one of 'auto', 'dummy'"),
    ],
)
def test_a_wrong_value_is_refused_by_name_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_kwargs(**{name: value})
    assert str(caught.value).startswith(f"{name}=")
    assert allowed in str(caught.value)


def test_no_road_leads_round_the_checks():
    with pytest.raises(ConfigError):
        EngineConfig(page_size=0)
    with pytest.raises(ConfigError):
        dataclasses.replace(EngineConfig(), page_size=0)


def test_the_pool_must_hold_a_page():
    with pytest.raises(ConfigError, match=r"max_total_tokens=8 .*page_size=16.*raise max_total_tokens"):
        EngineConfig(max_total_tokens=8, page_size=16)
    assert EngineConfig(max_total_tokens=16, page_size=16).max_total_tokens == 16


# --- SamplingParams ---------------------------------------------------------------------------------------------------


def test_none_means_all_defaults():
    assert SamplingParams.from_dict(None) == SamplingParams.from_dict({}) == SamplingParams()


def test_stop_is_stored_as_a_tuple_however_it_is_given():
    assert SamplingParams.from_dict({"stop": None}).stop == ()
    assert SamplingParams.from_dict({"stop": "END"}).stop == ("END",)
    assert SamplingParams.from_dict({"stop": ["a", "b"]}).stop == ("a", "b")
    assert SamplingParams.from_dict({"stop_token_ids": {7, 3}}).stop_token_ids == (3, 7)


@pytest.mark.parametrize(
    "params",
    [{"stop_token_ids": [1] * 16_385}, {"stop": ["a"] * 16_385}, {"logit_bias": dict.fromkeys(range(16385), 1.0)}],
)
def test_a_list_has_an_end(params):
    (name,) = params
    with pytest.raises(RequestError, match=rf"{name} has 16385 items; at most 16384 are taken"):
        SamplingParams.from_dict(params)


def test_sglangs_name_of_the_seed_is_understood_but_not_both():
    assert SamplingParams.from_dict({"sampling_seed": 5}) == SamplingParams(seed=5)
    with pytest.raises(RequestError, match="two names of one parameter"):
        SamplingParams.from_dict({"sampling_seed": 5, "seed": 5})


def test_from_dict_leaves_its_argument_alone():
    params = {"sampling_seed": 5}
    SamplingParams.from_dict(params)
    assert params == {"sampling_seed": 5}


@pytest.mark.parametrize("key", ["temprature", 3, None, "", 10**400])
def test_an_unknown_key_is_refused_with_the_list(key):
    with pytest.raises(RequestError, match=r"unknown sampling parameter .* are: max_new_tokens, "):
        SamplingParams.from_dict({key: 1})


def test_an_unknown_key_brings_the_closest():
    with pytest.raises(RequestError, match=r"Did you mean 'temperature'\?"):
        SamplingParams.from_dict({"temprature": 1})


def test_a_bias_is_stored_once_for_each_token():
    assert SamplingParams.from_dict({"logit_bias": {"7": 1, 3: -100}}).logit_bias == ((3, -100.0), (7, 1.0))
    assert SamplingParams.from_dict({"logit_bias": None}).logit_bias == ()
    assert SamplingParams.from_dict({"logit_bias": {}}).logit_bias == ()


@pytest.mark.parametrize(
    "bias",
    [5, "x", [1], [[1, 2]], {"a": 1}, {"-1": 1}, {-1: 1}, {True: 1}, {2**31: 1}, {"9" * 11: 1}, {"1": 1, 1: 2},
     {1: "2"}, {1: True}, {1: None}, {1: 100.5}, {1: -101}, {1: float("nan")}, {1: 10**400}, {1.5: 1}, {"\u0661": 1}],
)  # fmt: skip
def test_a_bias_that_is_none_is_refused(bias):
    with pytest.raises(RequestError, match=r"logit_bias=.* a mapping of token ids to numbers in \[-100, 100\]"):
        SamplingParams.from_dict({"logit_bias": bias})


@pytest.mark.parametrize("params", [[], "greedy", 5, SamplingParams()])
def test_only_a_mapping_is_taken(params):
    with pytest.raises(RequestError, match="must be a dict"):
        SamplingParams.from_dict(params)


def test_min_new_tokens_within_max_new_tokens():
    with pytest.raises(RequestError, match="min_new_tokens=9 is more than max_new_tokens=8"):
        SamplingParams.from_dict({"min_new_tokens": 9, "max_new_tokens": 8})


@pytest.mark.parametrize(
    ("params", "greedy"),
    [
        ({}, False),
        ({"temperature": 0}, True),
        ({"temperature": 1e-7}, True),
        ({"top_k": 1}, True),
        ({"top_k": 2}, False),
    ],
)
def test_greedy(params, greedy):
    assert SamplingParams.from_dict(params).greedy is greedy


_NUMBERS = [o for o in options.options_of(SamplingParams).values() if o.kind in (int, float) and not o.many]
_REALS = [o for o in _NUMBERS if o.kind is float]


@unhurried
@given(st.sampled_from(_NUMBERS), st.one_of(st.integers(), st.floats()))
def test_a_number_is_kept_exactly_or_refused_by_name(option, value):
    """Whatever the number: it comes back unchanged, or the error names the key and the range."""
    params = {"max_new_tokens": 2**62, option.name: value}
    limits = option.limits
    inside = limits.low < value <= limits.high or (value == limits.low and not limits.above) or value == limits.also
    if math.isfinite(value) and inside and abs(value) < 2**63 and (option.kind is float or isinstance(value, int)):
        kept = getattr(SamplingParams.from_dict(params), option.name)
        assert kept == value
        assert type(kept) is option.kind
    else:
        with pytest.raises(RequestError) as caught:
            SamplingParams.from_dict(params)
        assert str(caught.value).startswith(f"{option.name}=")
        assert option.allowed() in str(caught.value)


def test_a_number_too_long_to_print_is_refused_all_the_same():
    with pytest.raises(RequestError, match=r"max_new_tokens=<int> is not allowed"):
        SamplingParams.from_dict({"max_new_tokens": 10**5000})
    with pytest.raises(RequestError, match=r"unknown sampling parameter <int>"):
        SamplingParams.from_dict({10**5000: 1})


@unhurried
@given(st.sampled_from(_REALS), st.floats(0, 1, exclude_min=True))
def test_every_real_in_the_unit_interval_that_the_range_holds_is_accepted(option, fraction):
    value = option.limits.low + fraction * (option.limits.high - option.limits.low)
    assert getattr(SamplingParams.from_dict({option.name: value}), option.name) == value


@pytest.mark.parametrize("option", _NUMBERS, ids=lambda option: option.name)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, True, "1", [1], 1j, np.array([1, 2]), 10**400, object()]
)
def test_what_is_no_number_is_refused(option, value):
    with pytest.raises(RequestError, match=option.name):
        SamplingParams.from_dict({option.name: value})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@unhurried
@given(st.dictionaries(st.sampled_from([*options.options_of(SamplingParams), "sampling_seed", "tempreture"]), _JSON))
def test_any_json_is_understood_or_refused_as_a_request_error(params):
    """No body that a client can send raises anything else, and what is accepted describes itself faithfully."""
    try:
        accepted = SamplingParams.from_dict(params)
    except RequestError:
        return
    assert SamplingParams.from_dict(dataclasses.asdict(accepted)) == accepted


# --- What follows from the declarations -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams])
def test_every_option_accepts_its_default_and_says_what_it_is_for(cls):
    for option in options.options_of(cls).values():
        assert option.accept(option.default, ConfigError) == option.default
        assert len(option.help) > 20
        assert option.help.endswith(".")


def test_the_two_sets_of_options_share_no_name():
    """The command line has both in one parser."""
    assert not set(options.options_of(EngineConfig)) & set(options.options_of(SamplingParams))


def test_the_documentation_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == config_page.documentation(), "docs/configuration.md is stale: run `make docs`"
