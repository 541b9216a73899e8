"""Checkpoints: what Hugging Face and Orbax folders, GGUF and llama2.c files hold, read straight into sharded arrays.

Start at `checkpoints.checkpoint.open_checkpoint`; `checkpoints.table` states how a model's weights are stored and
`checkpoints.load` puts them on the devices. Nothing is imported here, so that a process which only needs a tokenizer
never pays for JAX.
"""
