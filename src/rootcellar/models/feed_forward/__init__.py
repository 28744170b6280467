"""What works on each token of a layer alone: one file each."""

from rootcellar.models.feed_forward.dense import Dense
from rootcellar.models.feed_forward.experts import Clamp, Experts

__all__ = ["Clamp", "Dense", "Experts"]
