"""Answers that follow a JSON schema, a regular expression or a grammar, by llguidance (https://github.com/guidance-ai).

Before each token of such a request llguidance says which tokens may come, as one bit each; the sampler takes no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from rootcellar.engine.tokenizer import Tokenizer
from rootcellar.errors import RequestError
from rootcellar.sampling_params import GRAMMARS, SamplingParams
from rootcellar.scheduler import Finish


class Grammars:
    """Makes the grammars of one model's requests."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """``vocab_size`` of the model; ``eos_token_ids``: what ends an answer when its grammar is fulfilled."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    def start(self, sampling: SamplingParams) -> Grammar | None:
        """The grammar that ``sampling`` asks for, at its beginning; None when it asks for none.

        Raises ``RequestError`` when it is no grammar; the message is llguidance's. May take a second for a large one.
        """
        name = sampling.grammar
        if name is None:
            return None
        source = str(getattr(sampling, name))
        try:
            text = _COMPILERS[name](source)
        except Exception as error:  # the converters raise what they like
            raise RequestError(f"{name} is not understood: {error}") from error
        matcher = LLMatcher(self._words(), text, log_level=0)
        if matcher.is_error():
            raise RequestError(f"{name} is not understood: {matcher.get_error()}")
        return Grammar(matcher, self._vocab_size, self._words().vocab_size)

    def _words(self) -> LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                size = max(self._vocab_size, self._tokenizer.vocab_size)
                eos = list(self._eos) or None
                self._vocabulary = LLTokenizer(self._tokenizer.to_json(), n_vocab=size, eos_token=eos)
            return self._vocabulary


_COMPILERS: dict[str, Callable[[str], str]] = {
    # Free white space is a trap that small models do not leave.
    "json_schema": lambda text: LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False}),
    "regex": LLMatcher.grammar_from_regex,
    "ebnf": lambda text: LLMatcher.grammar_from_lark(gbnf_to_lark(text)),
}
assert set(_COMPILERS) == set(GRAMMARS)


class Grammar:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, known: int) -> None:
        """``matcher`` over ``known`` tokens, at the beginning of an answer of a model that has ``vocab_size``."""
        self._matcher = matcher
        self._sizes = vocab_size, known
        self._row = np.empty((1, -(-known // 32)), np.int32)

    def copy(self) -> Grammar:
        """The same place, for another answer."""
        return Grammar(self._matcher.deep_copy(), *self._sizes)

    def allowed(self) -> NDArray[np.int32]:
        """int32 [ceil(vocab_size / 32)]: bit ``i % 32`` of word ``i // 32`` says whether token ``i`` may come next."""
        fill_next_token_bitmask(self._matcher, self._row, 0)
        if self._matcher.is_error():  # `take` ends the request
            self._row[:] = -1
        return self._row[0, : -(-self._sizes[0] // 32)]

    def take(self, token: int) -> Finish | None:
        """Follow the answer; a ``Finish`` when nothing can come after ``token``, or when llguidance gives up."""
        if not self._matcher.is_error():
            self._matcher.consume_token(token)
        if self._matcher.is_error():
            return Finish.abort("grammar", f"the answer's grammar failed: {self._matcher.get_error()}")
        return Finish("stop") if self._matcher.is_stopped() else None
