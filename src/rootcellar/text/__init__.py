"""Text to token ids and back, chats by a model's own template; without JAX, so that a small process can do it."""

from rootcellar.text.detokenizer import AFTER, Detokenizer, Offsets
from rootcellar.text.templates import TemplateTimeout
from rootcellar.text.tokenizer import Chat, Tokenizer

__all__ = ["AFTER", "Chat", "Detokenizer", "Offsets", "TemplateTimeout", "Tokenizer"]
