"""Text and token ids: tokenizers, prompts, chat templates, and text from tokens as they come. Knows no jax."""
