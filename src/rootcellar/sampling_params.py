"""How the tokens of one request are chosen, declared once, with SGLang's names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from rootcellar.errors import RequestError
from rootcellar.options import check_names, check_values, option

# Below this a temperature only amplifies float32 noise; SGLang draws the same line.
GREEDY_TEMPERATURE = 1e-6
# The engine's own seed: JAX in its default 32-bit mode keeps only so many bits, and would cut more without a word.
MAX_SEED = 2**32 - 1
# The parameters that give an answer its form.
GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling of one request. Constructing it checks every value; a wrong one raises RequestError.

    `stop` and `stop_token_ids` may be given as None, a list or (`stop`) one string; they are stored as tuples.
    """

    max_new_tokens: int = option(128, "Most tokens to generate; 0 only computes the prompt.", low=0)
    min_new_tokens: int = option(0, "No stop token, stop string or end of sequence before this many tokens.", low=0)
    # The upper limit keeps the scaled logits of masked tokens (-inf) and of others apart in float32.
    temperature: float = option(
        1.0, "0 always takes the likeliest token; higher values flatten the distribution.", low=0, high=1e6
    )
    top_p: float = option(
        1.0,
        "Choose among the likeliest tokens whose probabilities sum to this; 0 always takes the likeliest.",
        low=0,
        high=1,
    )
    top_k: int = option(-1, "Choose among this many likeliest tokens; -1 and 0 among all.", low=-1)
    min_p: float = option(
        0.0, "Leave out tokens with less than this fraction of the likeliest token's probability.", low=0, high=1
    )
    frequency_penalty: float = option(
        0.0, "Subtracted from a token's logit once for each time it was generated.", low=-2, high=2
    )
    presence_penalty: float = option(0.0, "Subtracted from a token's logit if it was generated at all.", low=-2, high=2)
    repetition_penalty: float = option(
        1.0,
        "Divides the positive and multiplies the negative logits of tokens in the prompt or the answer; "
        "above 1 discourages them.",
        low=0.01,
        high=2,
    )
    logit_bias: tuple[tuple[int, float], ...] = option(
        (), "Added to the logits of these tokens after the penalties; 100 nearly forces a token, -100 bans it.",
        low=-100, high=100,
    )  # fmt: skip
    stop: tuple[str, ...] = option((), "Strings that end the answer.")
    stop_token_ids: tuple[int, ...] = option((), "Token ids that end the answer, beside the model's own.", low=0)
    ignore_eos: bool = option(False, "Go on past the model's end-of-sequence token.")
    skip_special_tokens: bool = option(True, "Leave special tokens out of the text.")
    spaces_between_special_tokens: bool = option(
        True, "Changes nothing: the tokenizers here put no spaces between special tokens, as SGLang's fast ones."
    )
    no_stop_trim: bool = option(False, "Keep the stop string or stop token at the end of the text.")
    n: int = option(1, "Answers to generate; they share the prompt's KV cache.", low=1, high=128)
    seed: int | None = option(
        None,
        "Makes this request's random choices reproducible whatever runs beside it. None draws from random_seed.",
        low=-(2**63),
        high=2**63 - 1,
    )

    json_schema: str | None = option(None, "A JSON schema that the answer must follow, as text or as an object.")
    regex: str | None = option(None, "A regular expression that the whole answer must match.")
    ebnf: str | None = option(None, "A grammar (GBNF, rules of the form 'root ::= ...') that the answer must follow.")
    structural_tag: str | None = option(
        None, "A structural tag (xgrammar's format: text, marks and JSON in turn), as text or as an object."
    )

    def __post_init__(self) -> None:
        check_values(self, RequestError)
        if len(given := [name for name in GRAMMARS if getattr(self, name) is not None]) > 1:
            raise RequestError(f"{' and '.join(given)} are given: an answer can follow one of them.")
        if self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}: "
                "lower the first or raise the second."
            )

    @property
    def grammar(self) -> str | None:
        """Which of ``GRAMMARS`` the answer must follow."""
        return next((name for name in GRAMMARS if getattr(self, name) is not None), None)

    @property
    def penalized(self) -> bool:
        """Whether what was generated changes what is likely next."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken at every step, so that no random number is needed."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1 or self.top_p == 0

    @classmethod
    def from_dict(cls, params: Mapping[str, Any] | None) -> Self:
        """The parameters with these values and defaults for the rest and for those that are None; None: all defaults.

        Raises:
            RequestError: `params` is no mapping, a key is unknown (the message gives the closest one and the list),
                or a value is not allowed (the message gives the key, the value and what is allowed).
        """
        if params is None:
            return cls()
        if not isinstance(params, Mapping):
            raise RequestError(f"sampling_params must be a dict such as {{'temperature': 0}}, not {params!r}.")
        values = dict(params)
        if "sampling_seed" in values:  # SGLang's spelling
            if "seed" in values:
                raise RequestError("seed and sampling_seed are two names of one parameter: give one of them.")
            values["seed"] = values.pop("sampling_seed")
        for name in ("json_schema", "structural_tag"):
            if isinstance(values.get(name), Mapping | bool):
                values[name] = _json(name, values[name])
        check_names(cls, values, "sampling parameter", RequestError)
        return cls(**{name: value for name, value in values.items() if value is not None})


def _json(name: str, value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} is no JSON: {error}") from None
