"""The shortest program: continues some prompts with a model folder, a .gguf file or a model from the hub."""

import sys

from trtllm_jax import LLM, SamplingParams

PROMPTS = ["Hello, my name is", "The capital of France is", "The future of AI is"]


def main() -> None:
    """Generate and print."""
    model = sys.argv[1] if len(sys.argv) > 1 else "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    with LLM(model=model) as llm:
        for output in llm.generate(PROMPTS, SamplingParams(max_tokens=16)):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
