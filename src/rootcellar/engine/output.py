"""What a request says while it is computed: its text, its logprobs, its times."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.engine.clock import Clock
from rootcellar.engine.grammar import Grammar
from rootcellar.engine.routing import Routed
from rootcellar.engine.stops import Search
from rootcellar.errors import GenerationFailed
from rootcellar.misses import Spent
from rootcellar.scheduler import Finish, Guessed, Request, Stage
from rootcellar.scheduler.placeholders import tokens_only
from rootcellar.text import AFTER, Tokenizer

Update = dict[str, Any]

TokenLogprob = tuple[float | None, int, str | None]
"""(logprob, token id, text or None), as SGLang gives them."""


@dataclass(frozen=True)
class LogprobOptions:
    """What to report beside the tokens: prompt logprobs from ``start`` on (None: none), and the ``top`` likeliest.

    ``texts``: each with the text of its token.
    """

    start: int | None = None
    top: int = 0
    texts: bool = True

    def cells(self, prompt: int, generated: int) -> int:
        """Logprobs of a prompt and an answer of so many tokens."""
        scored = 0 if self.start is None else max(0, prompt - self.start)
        return (scored + generated) * (1 + self.top)


@dataclass
class Logprobs:
    """Logprobs of one request, filled by position: computing a prompt again after a retraction changes nothing."""

    options: LogprobOptions
    prompt: NDArray[np.float32]
    prompt_top: NDArray[np.float32]
    prompt_top_ids: NDArray[np.int32]
    output: list[float] = field(default_factory=list)
    output_top: list[list[tuple[float, int]]] = field(default_factory=list)
    shown: list[TokenLogprob] = field(default_factory=list)
    shown_top: list[list[TokenLogprob]] = field(default_factory=list)
    shown_prompt: dict[str, Any] | None = None

    @classmethod
    def of(cls, options: LogprobOptions, prompt: int) -> Logprobs:
        """Nothing yet, of a prompt of so many tokens."""
        rows = 0 if options.start is None else prompt
        top = rows, options.top
        return cls(options, np.zeros(rows, np.float32), np.zeros(top, np.float32), np.zeros(top, np.int32))


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a request had at one moment. Making one costs the engine's thread next to nothing; its reader renders it.

    What it refers to only ever grows, so it stays true while the request goes on. One reader at a time may render the
    outputs of a request.
    """

    tracker: Tracker
    finish: Finish | None
    at: float
    generated: int
    text: str
    stages: int
    versions: int

    def render(self) -> Update:
        """The update as callers of ``Engine.generate`` see it."""
        return self.tracker.render(self)

    @property
    def unrendered(self) -> int:
        """Logprobs that rendering it has to write, beyond those that were rendered before."""
        kept = self.tracker.logprobs
        if kept is None:
            return 0
        before = 0 if kept.shown_prompt is None else self.tracker.request.prompt_length
        return kept.options.cells(self.tracker.request.prompt_length - before, self.generated - len(kept.shown))


Deliver = Callable[[RequestOutput], None]
"""Called from the engine's thread with each output, the last of which has a ``finish``; must not block."""


class Tracker:
    """One request's output: follows its tokens, finds stop strings, delivers updates.

    The text that a streaming caller sees never shrinks: what could be the beginning of a stop string is held back until
    it is known to be none.

    Attributes:
        received, queued, started, first_token, last_token: when its caller asked for it, it began to wait, it first
            ran, and its first and newest token were there; seconds of the engine's clock, None before that.
        spent: what parts of its prompt took to be computed, ascending.
    """

    def __init__(
        self,
        request: Request,
        deliver: Deliver,
        *,
        tokenizer: Tokenizer | None,
        stream: bool,
        logprobs: LogprobOptions | None,
        deadline: float | None,
        seed: int,
        received: float,
        clock: Clock,
        grammar: Grammar | None = None,
        names: tuple[str, ...] = (),
        experts: Routed | None = None,
    ) -> None:
        """Follow ``request``.

        Args:
            names: what its caller calls it, the widest first.
            experts: what is to be known of the experts that its tokens went through; None: nothing.
            received: when its caller asked for it, by ``clock``.
        """
        self.request = request
        self._now = clock.now
        self.names = names or (request.rid,)
        self.seed = seed
        self.grammar = grammar
        self.experts = experts
        self.deadline = deadline
        self.logprobs: Logprobs | None = None
        if logprobs is not None:
            self.logprobs = Logprobs.of(logprobs, request.prompt_length)
        self._deliver = deliver
        self._stream = stream
        self._tokenizer = tokenizer
        skip = request.sampling.skip_special_tokens
        after = request.ids[max(0, request.prompt_length - AFTER) : request.prompt_length].tolist()
        self._detokenizer = tokenizer.detokenizer(skip, after) if tokenizer else None
        self._search: Search | None = None
        self._text = ""
        self._ended = False
        self._seen = 0
        self.queued = self._now()
        self.received = received
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.spent: list[Spent] = []
        self.versions: list[tuple[str, int]] = []
        """Versions of the weights, each with the index of the first token of the answer that it made."""
        self._kept: list[tuple[str, int, int]] = []
        """Versions whose KV was kept when others came: each, up to which token, and the retractions until then."""
        self.stages: list[tuple[str, float]] = [
            (Stage.TOKENIZE.value, self.received),
            (request.stage.value, self.queued),
        ]

    def note_stage(self) -> bool:
        """Record the request's stage when it changed; whether it did."""
        stage = self.request.stage
        if stage == self.stages[-1][0]:  # a stage is a string, and its ``value`` slow to look up
            return False
        now = self._now()
        if self.started is None and self.request.lease is not None:
            self.started = now
        self.stages.append((stage.value, now))
        return True

    def spend(self, spent: Spent) -> None:
        """A part of its prompt was computed. What a retraction has computed again is not spent again."""
        first = max(spent.start, self.spent[-1].stop if self.spent else 0)
        last = min(spent.stop, self.request.prompt_length)
        if first < last:
            part = (last - first) / (spent.stop - spent.start)
            self.spent.append(Spent(first, last, spent.seconds * part))

    def take_token(self, weight_version: str, now: float) -> Finish | None:
        """Follow the newest token, made with these weights; a Finish when its text or its grammar now ends."""
        if not self.versions or self.versions[-1][0] != weight_version:
            self.versions.append((weight_version, self.request.generated - 1))
        self.last_token = now
        if self.first_token is None:
            self.first_token = now
        complete = None if self.grammar is None else self.grammar.take(int(self.request.output[-1]))
        if self._detokenizer is None:
            return complete
        return self._read_text(final=False) or complete

    def _read_text(self, *, final: bool) -> Finish | None:
        assert self._detokenizer is not None
        assert self._tokenizer is not None
        request = self.request
        if self._search is None and request.sampling.stop:  # here, so that what waits takes no memory for it
            skipped = self._tokenizer.skipped if request.sampling.skip_special_tokens else {}
            self._search = Search(request.sampling.stop, skipped)
        finish, start, end = request.finish, request.prompt_length, request.length
        # A stop token is part of output_ids and, unless asked for, not of the text.
        stopped = finish is not None and finish.type == "stop" and isinstance(finish.matched, int)
        if stopped and not request.sampling.no_stop_trim:
            end -= 1
        new = request.ids[start + self._seen : end].tolist()
        self._seen = max(self._seen, end - start)
        if self._search is None:
            self._text += self._detokenizer.add(new)
            self._text += self._detokenizer.finish() if final else ""
            return None
        for token in new:
            unseen = self._search.spoken_of.get(token)
            found = self._show(self._detokenizer.add([token])) if unseen is None else self._search_in(unseen, False)
            if found is not None:
                return found
        return self._show(self._detokenizer.finish()) if final else None

    def _show(self, text: str) -> Finish | None:
        """Add ``text`` to the answer's, up to a stop string."""
        self._text += text
        return self._search_in(text, True)

    def _search_in(self, text: str, shown: bool) -> Finish | None:
        assert self._search is not None
        sampling = self.request.sampling
        found = self._search.read(text, shown=shown, counts=self.request.generated >= sampling.min_new_tokens)
        if found is None:
            return None
        self._text = self._text[: found.end if sampling.no_stop_trim else found.start]
        self._ended = True
        return Finish("stop", matched=found.stop)

    def kept_kv(self, weight_version: str) -> None:
        """Other weights come, and the request goes on over the KV that those of this version computed."""
        if self.request.computed:
            self._kept.append((weight_version, self.request.computed, self.request.retractions))

    def _kv_versions(self, newest: str) -> list[tuple[str, int]]:
        """Versions of the weights that computed its KV, each with the first token, of prompt and answer, that it did.

        A retraction has all of it computed anew.
        """
        alive = [(version, stop) for version, stop, before in self._kept if before == self.request.retractions]
        spans, start = [], 0
        for version, stop in alive:
            if stop > start:
                spans.append((version, start))
                start = stop
        return [*spans, (newest, start)]

    def publish(self) -> None:
        """Deliver an update if the caller streams."""
        if self._stream:
            self._deliver(self._output(None))

    def close(self) -> None:
        """Deliver the final update."""
        finish = self.request.finish
        assert finish is not None
        if self._detokenizer is not None and not (finish.type == "stop" and isinstance(finish.matched, str)):
            found = self._read_text(final=True)
            if found is not None and finish.type != "abort":
                finish = found
        self._ended = True
        self._deliver(self._output(finish))

    def fail(self, cause: str, message: str) -> None:
        """Deliver the final update of a request whose output cannot be made any more: what there is, and why."""
        self.logprobs = None  # they may lack the newest token
        with contextlib.suppress(Exception):  # a consumer that went away: there is nobody to tell
            self._deliver(self._output(Finish.abort(cause, message)))

    def _output(self, finish: Finish | None) -> RequestOutput:
        held = 0 if self._ended or self._search is None else self._search.held
        text = self._text[: len(self._text) - held]
        now = self._now()
        return RequestOutput(self, finish, now, self.request.generated, text, len(self.stages), len(self.versions))

    def render(self, then: RequestOutput) -> Update:
        """What the request had then, in the words of ``Engine.generate``."""
        request, n = self.request, then.generated
        versions = self.versions[: then.versions]
        meta: dict[str, Any] = {
            "id": request.rid,
            "prompt_tokens": request.prompt_length,
            "completion_tokens": n,
            "cached_tokens": request.cached or 0,
            "cached_tokens_details": request.cached_by_tier,
            "load_decisions": [decision.fields() for decision in request.decisions],
            "finish_reason": _finish_reason(then.finish, n),
            "e2e_latency": then.at - self.received,
            "queue_time": (self.started or then.at) - self.queued,
            "first_token_latency": None if self.first_token is None else self.first_token - self.received,
            "retractions": request.retractions,
            "weight_version": versions[-1][0] if versions else None,
            "weight_versions": versions,
            "stages": [(name, at - self.received) for name, at in self.stages[: then.stages]],
        }
        if spans := request.spans:
            there = request.cached or 0
            meta["image_tokens"] = sum(span.stop - span.start for span in spans)
            meta["cached_image_tokens"] = sum(max(0, min(span.stop, there) - span.start) for span in spans)
        if request.guessed.steps:
            meta |= _guess_fields(request.guessed, n)
        if self._kept and versions:
            meta["kv_weight_versions"] = self._kv_versions(versions[-1][0])
        if request.checkpoint:
            meta["storage_checkpoint"] = request.handle
        if request.depends is not None:
            meta["storage_checkpoint_dependency"] = request.dependency
        if self.experts is not None and then.finish is not None and self.experts.found is not None:
            meta["routed_experts"] = self.experts.text
        if self.logprobs is not None:
            meta |= self._logprob_fields(self.logprobs, n)
        start = request.prompt_length
        update: Update = {"output_ids": request.ids[start : start + n].tolist(), "meta_info": meta}
        if self._tokenizer is not None:
            update["text"] = then.text
        return update

    def _logprob_fields(self, kept: Logprobs, n: int) -> dict[str, Any]:
        request = self.request
        for i in range(len(kept.shown), n):
            kept.shown.append(self._entry(kept.output[i], int(request.ids[request.prompt_length + i])))
            if kept.options.top:
                kept.shown_top.append([self._entry(*pair) for pair in kept.output_top[i]])
        fields: dict[str, Any] = {"output_token_logprobs": kept.shown[:n]}
        if kept.options.top:
            fields["output_top_logprobs"] = kept.shown_top[:n]
        if kept.options.start is not None:
            # Complete since the answer's first token, or its end: made once, however often they are read.
            kept.shown_prompt = kept.shown_prompt or self._prompt_fields(kept, kept.options.start)
            fields |= kept.shown_prompt
        return fields

    def _prompt_fields(self, kept: Logprobs, start: int) -> dict[str, Any]:
        ids = tokens_only(self.request.ids[: self.request.prompt_length], self.request.spans)[start:].tolist()
        # Nothing comes before the first token of a prompt, so it has no probability; and what is no token has none.
        values = [float(x) if start + i and not math.isnan(x) else None for i, x in enumerate(kept.prompt[start:])]
        fields: dict[str, Any] = {
            "input_token_logprobs": [self._entry(*pair) for pair in zip(values, ids, strict=True)]
        }
        if kept.options.top:
            rows = zip(kept.prompt_top[start:], kept.prompt_top_ids[start:], strict=True)
            fields["input_top_logprobs"] = [
                [self._entry(*pair) for pair in zip(values.tolist(), ids.tolist(), strict=True)] if start + i else None
                for i, (values, ids) in enumerate(rows)
            ]
        return fields

    def _entry(self, value: float | None, token: int) -> TokenLogprob:
        texts = self.logprobs is not None and self.logprobs.options.texts
        return value, token, self._tokenizer.token_text(token) if self._tokenizer and texts else None


def _guess_fields(guessed: Guessed, generated: int) -> dict[str, Any]:
    """What came of guessing, as SGLang says it."""
    return {
        "spec_verify_ct": guessed.steps,
        "spec_draft_token_num": guessed.drafted,
        "spec_accept_token_num": guessed.accepted,
        "spec_accept_rate": guessed.accepted / guessed.drafted if guessed.drafted else 0.0,
        "spec_accept_length": generated / guessed.steps,
    }


def _finish_reason(finish: Finish | None, generated: int) -> dict[str, Any] | None:
    match finish:
        case None:
            return None
        case Finish(type="length"):
            return {"type": "length", "length": generated}
        case Finish(type="stop"):
            return {"type": "stop", "matched": finish.matched}
        case _:
            return {"type": "abort", "message": finish.message, "cause": finish.cause}


def in_order(results: list[Update], *, several: bool, strict: bool) -> Update | list[Update]:
    """The final ones of ``results`` in the order of the sequences; the one result of a call that has one.

    ``strict``: raise ``GenerationFailed`` when one of them failed.
    """
    final = [result for result in results if result["meta_info"]["finish_reason"] is not None]
    if several:
        ordered = sorted(final, key=lambda r: r["index"])
        final = [{k: v for k, v in r.items() if k != "index"} for r in ordered]
    if strict:
        refuse_failed(final)
    return final if several else final[0]


# What its caller asked for, or set a time for, is an answer: as far as it came.
_FAILURES = ("failed", "no_room", "grammar", "shutdown")


def refuse_failed(results: list[Update]) -> None:
    """Raise ``GenerationFailed`` when one of ``results`` ended for a reason that is not its caller's."""
    reasons = [(each["meta_info"]["id"], each["meta_info"]["finish_reason"]) for each in results]
    failed = [(rid, reason["message"]) for rid, reason in reasons if reason and reason.get("cause") in _FAILURES]
    if failed:
        rid, message = failed[0]
        raise GenerationFailed(f"{len(failed)} of {len(results)} answers failed; request {rid!r}: {message}", results)


def show(output: RequestOutput, index: int | None, strict: bool) -> Update:
    """An output as its caller sees it, with its ``index`` where there are several; ``strict`` as in ``in_order``."""
    result = output.render() if index is None else {**output.render(), "index": index}
    if strict:
        refuse_failed([result])
    return result
