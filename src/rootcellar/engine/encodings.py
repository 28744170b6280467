"""What the encoder made of pictures: kept by content, and made, a stage at a time, for those who run.

It is kept on the device and, with tiers, in host memory when it has left that.

A request that runs waits where its next token is of a picture that has no vectors yet; everybody else goes on. So a
picture is encoded once, whoever shows it meanwhile, and between two steps decoding waits for no more of an encoder than
costs what a few tokens of a prompt do. The vectors that running requests come to next are not evicted before their
chunk.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.models.encoders import Encoder
from rootcellar.models.params import declare
from rootcellar.runner import Runner, Vectors
from rootcellar.runner.encoding import Encoding, PictureEncoder
from rootcellar.runner.runner import Program
from rootcellar.scheduler import Finish, Request, Scheduler, Span
from rootcellar.scheduler.cutting import next_span

log = logging.getLogger(__name__)

_TOKENS = 64
"""Prompt tokens that cost as much as what is encoded between two steps, at most: everybody waits for both."""

Content = tuple[str, bytes]
"""Whose it is and by which weights, as the request's cache keys say it, and a span's content."""


@dataclass
class EncodingStats:
    """Since the start: pictures ``encoded``, in how many ``turns`` and ``seconds``; spans that were ``computed``, from
    the vectors of pictures; pictures ``evicted``.
    """

    encoded: int = 0
    turns: int = 0
    seconds: float = 0.0
    computed: int = 0
    evicted: int = 0


class Encodings:
    """Those of one engine. On its thread alone."""

    def __init__(
        self, encoder: Encoder, scheduler: Scheduler, runner: Runner, nbytes: int, chunk: int, host: int = 0
    ) -> None:
        """Keep up to ``nbytes`` of vectors, and up to ``host`` bytes of those that leave in host memory.

        ``chunk``: prompt tokens of a step, at most; what is encoded between two steps costs no more.
        """
        self.stats = EncodingStats()
        self._scheduler = scheduler
        self._runner = runner
        self._encoder = PictureEncoder(encoder, runner.placement)
        self._room = nbytes
        self._kept: OrderedDict[Content, Array] = OrderedDict()
        """The least recently used first."""
        self._host_room = host
        self._spilled: OrderedDict[Content, NDArray[np.floating]] = OrderedDict()
        """What left the device, in host memory, from where it enters steps as well; the least recently used first."""
        self._about: list[Content] = []
        """The pictures that are under way."""
        self._under_way: Encoding | None = None
        layers = jax.tree.leaves(declare(runner.placement.served)["layers"])
        self._most = min(chunk, _TOKENS) * sum(prod(spec.shape) for spec in layers)
        scheduler.cutter.seen = self._seen

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(vectors.nbytes for vectors in self._kept.values())

    @property
    def pictures(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def counts(self) -> dict[str, float]:
        """What happened since the start, and what is kept now; see ``EncodingStats``."""
        spilled = sum(vectors.nbytes for vectors in self._spilled.values())
        own = {"kept": self.pictures, "bytes": self.nbytes, "host_kept": len(self._spilled), "host_bytes": spilled}
        return {**asdict(self.stats), **own}

    def each_program(self) -> list[Program]:
        """See ``PictureEncoder``."""
        return self._encoder.each_program(self._runner.params)

    def _seen(self, request: Request, span: Span) -> bool:
        content = _content(request, span)
        return content in self._kept or content in self._spilled

    def given(self, request: Request, start: int, stop: int) -> Vectors | None:
        """The vectors of spans in tokens [start, stop) of a request, which are there; None where there are none."""
        at: list[NDArray[np.int64]] = []
        until: list[NDArray[np.int64]] = []
        rows: list[NDArray[np.floating]] = []
        for span in request.spans:
            first, last = max(start, span.start), min(stop, span.stop)
            if first >= last:
                continue
            self.stats.computed += last == span.stop
            content = _content(request, span)
            kept: OrderedDict[Content, Any] = self._kept if content in self._kept else self._spilled
            kept.move_to_end(content)
            rows.append(np.asarray(kept[content])[first - span.start : last - span.start])
            at.append(np.arange(first, last) - start)
            until.append(np.full(last - first, span.stop - 1))
        if not at:
            return None
        seen = np.concatenate(until) if self._encoder.encoder.atomic else None
        return Vectors(np.concatenate(at), np.concatenate(rows), seen)

    def turn(self, end: Callable[[Request, Finish], None]) -> bool:
        """Go on with what is under way, or begin with what running requests wait for; a little.

        Whether there was anything. Where the encoder fails, what it was about is forgotten, and whoever comes to that
        next is told to ``end``.
        """
        try:
            return self._go_on()
        except Exception as error:
            log.exception("an image could not be encoded; the requests that show it end with an error")
            why = Finish.abort("failed", f"an image could not be encoded: {type(error).__name__}: {error}")
            for request in self._wait_for_it():
                end(request, why)
            self._about, self._under_way = [], None
            return True

    def _go_on(self) -> bool:
        if self._under_way is None and not self._begin():
            return False
        assert self._under_way is not None
        encoding, began = self._under_way, time.perf_counter()
        done = self._encoder.go_on(self._runner.params, encoding, self._most)
        if done:
            self._under_way = None
            for content, vectors in zip(self._about, encoding.state, strict=False):
                self._kept[content] = vectors
            self.stats.encoded += encoding.count
        self.stats.turns += 1
        self.stats.seconds += time.perf_counter() - began
        return True

    def _begin(self) -> bool:
        waited: dict[Content, Span] = {}
        for request in self._scheduler.running:
            span = next_span(request) if request.spans else None
            if span is not None and not self._seen(request, span):
                waited.setdefault(_content(request, span), span)
        if not waited:
            return False
        self._about = contents = list(waited)  # as long as it is not known which of them
        pixels = [span.pixels for span in waited.values()]
        chosen = self._encoder.together(pixels)
        size = self.bytes_of(self._encoder.encoder, self._runner, pixels[0])
        while chosen and not self._make_room(size * len(chosen)):
            chosen.pop()
        if chosen:
            self._about = [contents[i] for i in chosen]
            self._under_way = self._encoder.begin([pixels[i] for i in chosen])
        return bool(chosen)

    @staticmethod
    def bytes_of(encoder: Encoder, runner: Runner, pixels: NDArray[np.uint8]) -> int:
        """Most bytes that the vectors of a prepared picture may take."""
        served = runner.placement.served
        return encoder.length(pixels) * served.hidden_size * runner.programs.dtype.itemsize

    def _make_room(self, nbytes: int) -> bool:
        """Evict until so many bytes are free; False, and nothing changed, where what is needed next is in the way.

        First goes what no running request comes to, and then what one comes to later than to its next picture.
        """
        lacking = nbytes + self.nbytes - self._room
        running = self._scheduler.running
        ahead = [_content(r, s) for r in running for s in r.spans if s.stop > r.computed]
        nearest = {_content(r, s) for r in running if (s := next_span(r)) is not None}
        order = sorted(self._kept, key=set(ahead).__contains__)  # of equals the least recently used first
        going = []
        for content in order:
            if lacking <= 0:
                break
            if content not in nearest:
                going.append(content)
                lacking -= self._kept[content].nbytes
        if lacking > 0:
            return False
        for content in going:
            self._spill(content)
        self.stats.evicted += len(going)
        return True

    def _spill(self, content: Content) -> None:
        """From the device to host memory, where it fits, in the place of what was not used there for longest."""
        vectors = self._kept.pop(content)
        if vectors.nbytes > self._host_room:
            return
        self._spilled[content] = np.asarray(vectors)
        while sum(each.nbytes for each in self._spilled.values()) > self._host_room:
            self._spilled.popitem(last=False)

    def _wait_for_it(self) -> Sequence[Request]:
        """The running requests that come next to what is under way."""
        nearest = [(request, next_span(request)) for request in self._scheduler.running]
        return [r for r, span in nearest if span is not None and _content(r, span) in self._about]

    def forget(self) -> None:
        """Forget all: the weights change, or memory is given back."""
        self._kept.clear()
        self._spilled.clear()
        self._about, self._under_way = [], None


def _content(request: Request, span: Span) -> Content:
    return f"{request.epoch}/{request.namespace}", span.content
