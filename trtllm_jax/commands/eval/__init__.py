"""`trtllm-eval`: evaluates a model with lm-eval on the engine."""
