"""What works on each token of a layer alone: one file each."""

from rootcellar.models.feed_forward.dense import Dense
from rootcellar.models.feed_forward.experts import Clamp, Experts
from rootcellar.models.feed_forward.plain import Plain

__all__ = ["Clamp", "Dense", "Experts", "Plain"]
