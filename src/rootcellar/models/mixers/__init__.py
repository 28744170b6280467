"""What mixes tokens in a layer: one file each."""

from rootcellar.models.mixers.attention import Attention, Temperature
from rootcellar.models.mixers.latent import Latent
from rootcellar.models.mixers.mamba2 import Mamba2

__all__ = ["Attention", "Latent", "Mamba2", "Temperature"]
