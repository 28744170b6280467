"""One request, as the scheduler sees it.

    ids      [ prompt ................................ | answer ......... | room for the rest ]
             0                                     prompt_length        length
    KV       [ shared pages of the tree | own pages ............... ]
             0                      committed                    computed

``0 <= committed <= computed < length``: the newest token never has its KV yet; computing it gives the next one. A
request with one token left to compute is *decoding*, with more it is *prefilling*: a retracted request prefills its
own answer. The lease has ``slots >= computed`` tokens of room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import Eviction, Key, Lease
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler.loads import Decision
from rootcellar.scheduler.placeholders import Span
from rootcellar.scheduler.stages import Stage, advance_stage


@dataclass(frozen=True)
class Finish:
    """Why a request ended. ``type``: "stop", "length" or "abort".

    ``matched``: the token id or string that stopped it; ``message``: why it was aborted, for people; ``cause``: the
    same in a word: "asked" (somebody wanted it), "gone" (its caller is), "timeout", "no_room", "grammar" (llguidance
    gave up on it), "failed" (the engine could not) or "shutdown".
    """

    type: str
    matched: int | str | None = None
    message: str | None = None
    cause: str | None = None

    @classmethod
    def abort(cls, cause: str, message: str) -> Finish:
        """An end before its time."""
        return cls("abort", message=message, cause=cause)


class Proposal(NamedTuple):
    """What stands where the last ``matched`` tokens of a request stand too: the tokens after them."""

    matched: int
    tokens: tuple[int, ...]


NOTHING = Proposal(0, ())


@dataclass(slots=True)
class Guessed:
    """What came of guessing a request's tokens (``guessing.py``).

    ``steps``: those that verified a guess or might have; ``drafted``, ``accepted``: tokens guessed, and those of them
    that were right. Then what the next guess goes by: what was ``found`` when the request had ``at`` tokens, how many
    tokens that was found lately were ``right``, and how many others' would have been where as much matched.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    found: Proposal = NOTHING
    at: int = 0
    right: float = 0.0
    expected: float = 0.0


@dataclass(frozen=True, slots=True)
class Met:
    """What the cache knew of a request's prompt when it was opened.

    ``wanted``: tokens that it might have given; ``reaches``: what each tier could give, ``branch``: what the tree knew,
    in tokens; ``evicted``: what is remembered of the page that it lacked there.
    """

    wanted: int = 0
    reaches: tuple[int, ...] = ()
    branch: int = 0
    evicted: Eviction | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """Where the two requests for one prompt meet, when prefill and decode are apart.

    ``host``, ``port``: of the bootstrap service of the prefill node; ``number``: SGLang's ``bootstrap_room``.
    """

    host: str
    port: int
    number: int


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to compute; made by :meth:`new`.

    Attributes:
        rid: its name.
        ids: int64 [prompt_length + max_new_tokens]; see the picture above.
        prompt_length: tokens of the prompt.
        length: tokens known.
        sampling: its sampling parameters.
        stop_ids: token ids that end it.
        namespace: requests of different namespaces share nothing.
        tenant: who asks (the name of an API key): for fairness alone, ``namespace`` says what is shared.
        call: which of the tenant's calls asks: one HTTP request or ``generate()``, whatever its prompts and ``n``.
        guessable: several of its tokens may be verified in one step; a grammar knows what may come after one alone.
        bound: the host must know each of its tokens before it can say what may come next, or how likely: a grammar or a
            penalty does.
        epoch: the version of the weights that its KV is computed with; requests of different epochs share nothing.
        priority: higher goes first.
        score_from: the KV of positions from here on must be computed, not taken from the cache, because the logprobs of
            the prompt's tokens are wanted; None once they are there, or when they are not wanted.
        order: the place in the order of arrival.
        since: how many requests had been started when it arrived.
        lease: its hold on the cache while it runs.
        computed: tokens whose KV is there.
        committed: tokens whose KV is shared.
        commit_at: tokens at which the next ones are, while it decodes.
        slots: tokens that its lease has slots for.
        cached: prompt tokens that were taken from the cache when it first ran; None before that.
        cached_by_tier: where they came from, by tier.
        met: what the cache knew of it then; ``opened``: the tick at which that was.
        lost: tokens up to which a farther tier had more of it, that failed to come.
        stored: tokens that a store gave host memory while it waited.
        checkpoint: whether what it leaves is to be written to the store at once; ``handle`` then names that, for
            somebody to depend on, unless there is nothing to name.
        depends: such a handle, that it waits for; ``dependency`` says what became of that.
        decisions: whether what farther tiers had of it was loaded, or computed, and why.
        resumable: tokens after which it last began from a cached recurrent state, or left its own.
        branch: tokens that it is known to share with another request, where a recurrent state is worth leaving.
        retractions: how often it lost its memory and waited again.
        claimed: whether others had to make way for it: once is enough.
        guessed: what came of guessing its tokens.
        room: where it meets the request for the same prompt on another node; None: nowhere.
        gives: whether only its prompt is computed, for the other node; else that one computes it for this.
        stage: where it is; :meth:`enter` changes it.
        finish: why it ended, once it has.
        spans: where its prompt has pictures, ascending.
        places: int32 [3, prompt_length + max_new_tokens], where rotary embeddings of three axes take its tokens to be;
            None: at their positions.
    """

    rid: str
    ids: NDArray[np.int64]
    prompt_length: int
    length: int
    sampling: SamplingParams
    stop_ids: frozenset[int]
    namespace: str = ""
    priority: int = 0
    score_from: int | None = None
    tenant: str = ""
    call: int = 0
    guessable: bool = True
    bound: bool = False
    epoch: str = ""
    order: int = 0
    since: int = 0
    lease: Lease | None = None
    computed: int = 0
    committed: int = 0
    commit_at: int = 0
    slots: int = 0
    cached: int | None = None
    cached_by_tier: dict[str, int] = field(default_factory=dict)
    met: Met = Met()
    opened: int = 0
    lost: int = 0
    stored: int = 0
    checkpoint: bool = False
    handle: str | None = None
    depends: str | None = None
    dependency: str | None = None
    decisions: list[Decision] = field(default_factory=list)
    resumable: int = 0
    branch: int = 0
    retractions: int = 0
    claimed: bool = False
    guessed: Guessed = field(default_factory=Guessed)
    room: Room | None = None
    gives: bool = False
    stage: Stage = Stage.PREFILL_WAITING
    finish: Finish | None = None
    spans: tuple[Span, ...] = ()
    places: NDArray[np.int32] | None = None

    @classmethod
    def new(
        cls,
        rid: str,
        prompt: NDArray[np.integer],
        sampling: SamplingParams,
        *,
        stop_ids: frozenset[int] = frozenset(),
        namespace: str = "",
        priority: int = 0,
        score_from: int | None = None,
        tenant: str = "",
        call: int = 0,
        guessable: bool = True,
        bound: bool = False,
        checkpoint: bool = False,
        depends: str | None = None,
        room: Room | None = None,
        gives: bool = False,
        spans: tuple[Span, ...] = (),
        places: NDArray[np.int32] | None = None,
    ) -> Request:
        """A request for the continuation of ``prompt`` (token ids, at least one).

        ``places``: int32 [3, len(prompt) + 1], those of the prompt and of the token after it.
        """
        ids = np.zeros(len(prompt) + sampling.max_new_tokens, np.int64)
        ids[: len(prompt)] = prompt
        if places is not None:  # an answer goes on from there, in each axis alike
            after = np.arange(1, len(ids) - len(prompt), dtype=np.int32)
            places = np.concatenate([places, places[:, -1:] + after], axis=1)
        return cls(
            rid,
            ids,
            len(prompt),
            len(prompt),
            sampling,
            stop_ids,
            namespace,
            priority,
            score_from,
            tenant,
            call,
            guessable,
            bound,
            checkpoint=checkpoint,
            depends=depends,
            room=room,
            gives=gives,
            spans=spans,
            places=places,
            stage=_first_stage(room, gives),
        )

    def enter(self, stage: Stage) -> None:
        """Go to ``stage``; ``EngineError`` where the table of stages does not allow it."""
        self.stage = advance_stage(self.rid, self.stage, stage)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return self.length - self.computed

    def kept(self, most: int) -> int:
        """Tokens of the answer yet to come that memory is kept for, where that is done for ``most`` of each."""
        return min(most, len(self.ids) - self.length)

    def ahead(self, most: int) -> int:
        """Tokens to compute before the next one can be chosen, and those that are kept room for."""
        return self.remaining + self.kept(most)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return self.length - self.prompt_length

    @property
    def output(self) -> NDArray[np.int64]:
        """Token ids of the answer so far (a view)."""
        return self.ids[self.prompt_length : self.length]

    def key(self, n: int) -> Key:
        """The cache key of the first ``n`` tokens. They never change, so the tree may refer to them where they are."""
        ids = self.ids[:n]
        ids.setflags(write=False)
        return Key(ids, f"{self.epoch}/{self.namespace}")

    @property
    def whole(self) -> Key:
        """The key of what another node may give of its prompt: all but the newest token."""
        return self.key(self.prompt_length - 1)

    @property
    def matchable(self) -> int:
        """Tokens that a cached prefix may cover: not the newest, and nothing whose logprob is wanted."""
        limit = self.length - 1
        return limit if self.score_from is None else min(limit, self.score_from)

    def append(self, token: int) -> None:
        """Add the chosen token, and end the request if it was the last."""
        ids, at = self.ids, self.length
        ids[at] = token
        self.length = at + 1
        if token in self.stop_ids and self.generated > self.sampling.min_new_tokens:
            self.finish = Finish("stop", matched=token)
        elif at + 1 == len(ids):
            self.finish = Finish("length")

    def take(self, tokens: Sequence[int], follow: Callable[[int], Finish | None] | None) -> None:
        """Add chosen tokens, the first of its answer maybe, up to its last; ``follow`` is asked after each."""
        self.score_from = None
        if self.sampling.max_new_tokens == 0:
            self.computed = self.length
            self.finish = Finish("length")
            return
        for j, token in enumerate(tokens):
            self.append(token)
            if follow is not None:
                found = follow(j)
                self.finish = self.finish or found
            if self.finish is not None:
                break
        # Each token but the newest has its KV by now.
        self.computed = self.length - 1

    def banned(self, at: int) -> tuple[int, ...]:
        """Token ids that must not be chosen for position ``at``: what would end the answer before its least length."""
        return tuple(self.stop_ids) if at - self.prompt_length < self.sampling.min_new_tokens else ()


def _first_stage(room: Room | None, gives: bool) -> Stage:
    if room is None:
        return Stage.PREFILL_WAITING
    return Stage.PREFILL_BOOTSTRAP if gives else Stage.DECODE_BOOTSTRAP
