"""Answers that follow a JSON schema, a regular expression or a grammar, by llguidance (https://github.com/guidance-ai).

Before each token of such a request llguidance says which tokens may come, as one bit each; the sampler takes no other.

A grammar is compiled on a thread of its own, after a process of its own has compiled it (``rootcellar.grammars``): so
neither the engine's thread nor an event loop waits for it, and one that overflows a stack or takes too long is refused.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from rootcellar.errors import EngineError, QueueFull, RequestError, RequestTooLarge
from rootcellar.grammars.compiling import Vocabulary, matcher
from rootcellar.grammars.process import Bounds, Worker
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import Finish
from rootcellar.text import Tokenizer

# Four times that of the process which tried the grammar before.
_STACK_BYTES = 16 * 2**20
# Compiled grammars that are kept: how many, and what they may take together by what the other process needed.
_KEPT = 64
_KEPT_BYTES = 128 * 2**20
_BYTES_PER_CHARACTER = 64
# One step may take so much of the processor's time; the engine's thread does nothing else meanwhile.
_STEP_SECONDS = 1.0


Definition = tuple[str, str]
"""A grammar: the parameter that names it, and its text."""


@dataclass(frozen=True)
class _Kept:
    matcher: LLMatcher
    nbytes: int


class Grammars:
    """Makes the grammars of one model's requests, and remembers the latest."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        bounds: Bounds,
        max_waiting: int | None = None,
        step_seconds: float = _STEP_SECONDS,
    ) -> None:
        """``vocab_size`` of the model; ``eos_token_ids``: what ends an answer when its grammar is fulfilled.

        Nothing is started before the first grammar. ``max_waiting``: how many may wait to be compiled.
        ``step_seconds``: of the processor's time that one step of a grammar may take.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._bounds = bounds
        self._max_waiting = max_waiting
        self._step_seconds = step_seconds
        self._lock = threading.Lock()
        self._kept: OrderedDict[Definition, _Kept] = OrderedDict()
        self._waiting = 0
        self._closed = False
        self._executor: ThreadPoolExecutor | None = None
        self._worker: Worker | None = None
        self._words: LLTokenizer | None = None

    def start(self, samplings: Sequence[SamplingParams]) -> Future[list[Grammar | None]] | None:
        """The grammars that the sequences of one call ask for, at their beginnings; None when they ask for none.

        The future is done already when all were compiled lately. It has a ``RequestError`` when one is no grammar (the
        message is llguidance's) or is beyond the bounds, ``EngineError`` when there is no process to try it.

        Raises:
            RequestTooLarge: a text is longer than ``max_grammar_length``.
            QueueFull: too many calls wait.
        """
        definitions = [
            None if each.grammar is None else (each.grammar, str(getattr(each, each.grammar))) for each in samplings
        ]
        wanted = {definition for definition in definitions if definition is not None}
        if not wanted:
            return None
        for name, source in wanted:
            if len(source) > self._bounds.length:
                raise RequestTooLarge(
                    f"{name} has {len(source)} characters: at most {self._bounds.length} are allowed "
                    "(max_grammar_length)"
                )
        kept = {definition: found for definition in wanted if (found := self._find(definition)) is not None}
        if len(kept) < len(wanted):
            return self._enqueue(definitions)
        future: Future[list[Grammar | None]] = Future()
        future.set_result([self._begin(definition, kept) for definition in definitions])
        return future

    def close(self) -> None:
        """End the process and the thread. Whoever waits gets an ``EngineError``."""
        with self._lock:
            self._closed = True
            executor, worker = self._executor, self._worker
        if executor is not None and worker is not None:
            worker.stop()
            executor.shutdown()
            worker.close()

    def _enqueue(self, definitions: list[Definition | None]) -> Future[list[Grammar | None]]:
        with self._lock:
            if self._closed:
                raise EngineError("the engine was shut down; make a new Engine")
            if self._max_waiting is not None and self._waiting >= self._max_waiting:
                raise QueueFull(
                    f"{self._waiting} grammars wait to be compiled (max_queued_requests); try again later or raise it"
                )
            self._waiting += 1
            future = self._threads().submit(self._compile_all, definitions)
        future.add_done_callback(self._no_longer_waits)
        return future

    def _no_longer_waits(self, _: Future[list[Grammar | None]]) -> None:
        with self._lock:
            self._waiting -= 1

    def _threads(self) -> ThreadPoolExecutor:
        """The one thread that compiles, with a large stack; it starts with its first task, so that is given here."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="rootcellar-grammars")
            size = max(self._vocab_size, self._tokenizer.vocab_size)
            vocabulary = Vocabulary(self._tokenizer.to_json(), size, self._eos)
            self._worker = Worker(vocabulary, self._bounds)
            before = threading.stack_size(_STACK_BYTES)
            self._executor.submit(self._read_words, vocabulary)
            threading.stack_size(before)
        return self._executor

    def _read_words(self, vocabulary: Vocabulary) -> None:
        self._words = vocabulary.read()

    def _find(self, definition: Definition) -> LLMatcher | None:
        with self._lock:
            if definition not in self._kept:
                return None
            self._kept.move_to_end(definition)
            return self._kept[definition].matcher

    def _compile_all(self, definitions: list[Definition | None]) -> list[Grammar | None]:
        """On the thread that compiles, within the time of one call."""
        end = time.monotonic() + self._bounds.seconds
        kept: dict[Definition, LLMatcher] = {}
        for definition in definitions:
            if definition is not None and definition not in kept:
                kept[definition] = self._find(definition) or self._compile(definition, end)
        return [self._begin(definition, kept) for definition in definitions]

    def _compile(self, definition: Definition, end: float) -> LLMatcher:
        if self._closed:
            raise EngineError("the engine was shut down; make a new Engine")
        assert self._worker is not None
        assert self._words is not None
        try:
            text, nbytes = self._worker.try_out(*definition, max(0.0, end - time.monotonic()))
        except RequestError as error:
            if self._closed:  # which is what ended the process
                raise EngineError("the engine was shut down") from error
            raise
        made = matcher(self._words, text)
        self._keep(definition, _Kept(made, max(nbytes, _BYTES_PER_CHARACTER * len(definition[1]))))
        return made

    def _keep(self, definition: Definition, kept: _Kept) -> None:
        with self._lock:
            self._kept[definition] = kept
            while len(self._kept) > _KEPT or sum(each.nbytes for each in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)

    def _begin(self, definition: Definition | None, kept: Mapping[Definition, LLMatcher]) -> Grammar | None:
        if definition is None:
            return None
        assert self._words is not None

        def forget() -> None:
            with self._lock:
                self._kept.pop(definition, None)

        return Grammar(
            kept[definition].deep_copy(), self._vocab_size, self._words.vocab_size, forget, self._step_seconds
        )


class Grammar:
    """Where one answer is in its grammar."""

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, known: int, forget: Callable[[], None], step_seconds: float
    ) -> None:
        """``matcher`` over ``known`` tokens, at the beginning of an answer of a model that has ``vocab_size``.

        ``forget`` is called when it breaks: copies share what was computed of the grammar, and so its limits.
        """
        self._matcher = matcher
        self._sizes = vocab_size, known
        self._forget = forget
        self._row = np.empty((1, -(-known // 32)), np.int32)
        self._step_seconds = step_seconds
        self._slow = False

    def allowed(self) -> NDArray[np.int32]:
        """int32 [ceil(vocab_size / 32)]: bit ``i % 32`` of word ``i // 32`` says whether token ``i`` may come next."""
        before = time.thread_time()
        fill_next_token_bitmask(self._matcher, self._row, 0)
        self._slow = time.thread_time() - before > self._step_seconds
        if self._matcher.is_error():  # `take` ends the request
            self._row[:] = -1
        return self._row[0, : -(-self._sizes[0] // 32)]

    def take(self, token: int) -> Finish | None:
        """Follow the answer; a ``Finish`` when nothing can come after ``token``, or when llguidance gives up."""
        if not self._matcher.is_error():
            self._matcher.consume_token(token)
        if self._slow or self._matcher.is_error():
            self._forget()
            reason = self._matcher.get_error().partition("\n<state>")[0] or "a step of it takes too long; simplify it"
            return Finish.abort("grammar", f"the answer's grammar failed: {reason}")
        return Finish("stop") if self._matcher.is_stopped() else None
