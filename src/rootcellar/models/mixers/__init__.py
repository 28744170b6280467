"""What mixes tokens in a layer: one file each."""

from rootcellar.models.mixers.attention import Attention
from rootcellar.models.mixers.latent import Latent

__all__ = ["Attention", "Latent"]
