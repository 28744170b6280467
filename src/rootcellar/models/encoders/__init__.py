"""What makes vectors of pictures, one file for each encoder. See ``encoder.Encoder``."""

from rootcellar.models.encoders.encoder import Encoder, EncoderStage, Laid
from rootcellar.models.encoders.gemma3 import Gemma3Vision
from rootcellar.models.encoders.qwen2_5_vl import Qwen25Vision
from rootcellar.models.encoders.qwen3_5 import Qwen35Vision

__all__ = ["Encoder", "EncoderStage", "Gemma3Vision", "Laid", "Qwen25Vision", "Qwen35Vision"]
