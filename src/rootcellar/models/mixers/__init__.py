"""What mixes tokens in a layer: one file each."""

from rootcellar.models.mixers.attention import Attention, Temperature
from rootcellar.models.mixers.gated_delta import GatedDelta
from rootcellar.models.mixers.latent_attention import LatentAttention
from rootcellar.models.mixers.mamba2 import Mamba2

__all__ = ["Attention", "GatedDelta", "LatentAttention", "Mamba2", "Temperature"]
