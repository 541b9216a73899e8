"""`trtllm-bench`."""
