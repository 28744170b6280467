"""What mixes tokens in a layer: one file each."""

from rootcellar.models.mixers.attention import Attention

__all__ = ["Attention"]
