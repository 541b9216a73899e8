"""Llama-3.1-8B's shape with random weights on one GPU: that the engine starts, and a first look at its speed.

    python benchmarks/gpu_smoke.py [--batches 1 32 128] [--layers 32]

One JSON line a result. Decode tokens/s = batch x (new - 1) / (time of `new` tokens - time of one token).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
NEW = 256


def main() -> None:
    """Start, warm up, measure each batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    from trtllm_jax import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": args.layers}))
        started = time.perf_counter()
        llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_batch_size=max(args.batches),
                  max_num_tokens=4096, max_seq_len=4608, kv_cache_config={"enable_block_reuse": False})  # fmt: skip
    print(json.dumps({"start_s": round(time.perf_counter() - started, 1), **llm.get_kv_cache_capacity()}), flush=True)
    rng = np.random.default_rng(0)

    def seconds(batch: int, length: int, new: int, **sampling: float) -> float:
        prompts = [rng.integers(0, 128000, length).tolist() for _ in range(batch)]
        params = SamplingParams(max_tokens=new, end_id=-1, ignore_eos=True, **sampling)
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    for batch in args.batches:
        seconds(batch, 128, 16)
        whole, first = seconds(batch, 128, NEW), seconds(batch, 128, 1)
        rate = batch * (NEW - 1) / (whole - first)
        step = 1e3 * (whole - first) / (NEW - 1)
        print(json.dumps({"decode_batch": batch, "tokens_per_s": round(rate), "ms_a_step": round(step, 2)}), flush=True)
    for length in (128, 1024, 4096):
        times = sorted(seconds(1, length, 1) for _ in range(3))
        print(json.dumps({"prompt": length, "time_to_first_token_ms": round(1e3 * times[1], 1)}), flush=True)
    llm.shutdown()


if __name__ == "__main__":
    main()
