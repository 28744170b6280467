"""Compute: one compiled step over a packed batch, and the sampler."""

from rootcellar.runner.batch import Batch, Part, Shapes
from rootcellar.runner.compiles import CompileCounter
from rootcellar.runner.placement import Placement
from rootcellar.runner.runner import Runner
from rootcellar.runner.sampler import SamplingBatch

__all__ = ["Batch", "CompileCounter", "Part", "Placement", "Runner", "SamplingBatch", "Shapes"]
