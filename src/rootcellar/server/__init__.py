"""Speak HTTP: the routes of OpenAI, SGLang and vLLM, and our own, over one engine."""
