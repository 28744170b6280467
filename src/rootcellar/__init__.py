"""rootcellar: an LLM inference engine in Python and JAX whose heart is its KV cache."""

__version__ = "0.1.0"
