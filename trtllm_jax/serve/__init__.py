"""The OpenAI server: an HTTP application over any `LLM`, without jax."""
