"""SGLang's own routes, vLLM's names for some of them, and what only this server has."""
