"""What works on each token of a layer alone: one file each."""

from rootcellar.models.feed_forward.dense import Dense

__all__ = ["Dense"]
