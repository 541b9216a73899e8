"""Text and token ids: tokenizers, prompts, chat templates and incremental detokenization. Imports no jax."""
