"""Decide: which tokens of which requests the next step computes."""

from rootcellar.scheduler.request import Finish, Request, Stage
from rootcellar.scheduler.scheduler import POLICIES, Chunk, Plan, Scheduler
from rootcellar.scheduler.snapshots import Snapshots

__all__ = ["POLICIES", "Chunk", "Finish", "Plan", "Request", "Scheduler", "Snapshots", "Stage"]
