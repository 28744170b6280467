"""Compute: one compiled step over a packed batch, and the sampler."""

from rootcellar.runner.batch import Batch, BatchPart, Shapes, Vectors
from rootcellar.runner.compiles import CompileCounter
from rootcellar.runner.placement import Placement
from rootcellar.runner.programs import Programs
from rootcellar.runner.runner import Runner, Unread, pools_of
from rootcellar.runner.sampler import SamplingBatch

__all__ = [
    "Batch",
    "BatchPart",
    "CompileCounter",
    "Placement",
    "Programs",
    "Runner",
    "SamplingBatch",
    "Shapes",
    "Unread",
    "Vectors",
    "pools_of",
]
