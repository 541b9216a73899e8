"""`trtllm-eval`."""
