"""Decide: which tokens of which requests the next step computes, and what is brought closer for them."""

from rootcellar.scheduler.guessing import Guesses, NgramGuesser, keep
from rootcellar.scheduler.loads import Decision, Loads, Rates, TierRate
from rootcellar.scheduler.placeholders import Span
from rootcellar.scheduler.plan import POLICIES, Chunk, Follow, Plan
from rootcellar.scheduler.prefetching import PREFETCH_POLICIES, Prefetcher, PrefetchPolicy, PrefetchRules
from rootcellar.scheduler.request import Finish, Guessed, Request, Room
from rootcellar.scheduler.scheduler import Scheduler
from rootcellar.scheduler.snapshots import Snapshots
from rootcellar.scheduler.stages import FORWARD, Stage

__all__ = [
    "FORWARD",
    "POLICIES",
    "PREFETCH_POLICIES",
    "Chunk",
    "Decision",
    "Finish",
    "Follow",
    "Guessed",
    "Guesses",
    "Loads",
    "NgramGuesser",
    "Plan",
    "PrefetchPolicy",
    "PrefetchRules",
    "Prefetcher",
    "Rates",
    "Request",
    "Room",
    "Scheduler",
    "Snapshots",
    "Span",
    "Stage",
    "TierRate",
    "keep",
]
