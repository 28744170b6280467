"""Decide: which tokens of which requests the next step computes."""

from rootcellar.scheduler.plan import POLICIES, Chunk, Follow, Plan
from rootcellar.scheduler.request import Finish, Request
from rootcellar.scheduler.scheduler import Scheduler
from rootcellar.scheduler.snapshots import Snapshots
from rootcellar.scheduler.stages import FORWARD, Stage

__all__ = ["FORWARD", "POLICIES", "Chunk", "Finish", "Follow", "Plan", "Request", "Scheduler", "Snapshots", "Stage"]
