"""From prompts and parameters to the engine's sequences, and from what it computes to results. Knows no jax."""
