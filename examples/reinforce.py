"""REINFORCE with the engine in the loop: it samples answers, optax updates the weights, and the engine uses them.

    python examples/reinforce.py [STEPS]

The engine reads the optimiser's arrays: no weight is copied. The model is tiny and random, and the reward is a toy: the
fraction of an answer's tokens that are below 25, in a vocabulary of 100.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trtllm_jax import LLM, RequestOutput, SamplingParams, load_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
PROMPTS = np.random.default_rng(0).integers(0, 100, (2, 6))
SAMPLES, TOKENS = 16, 16
STEPS = 15


def reward(answers: np.ndarray) -> np.ndarray:
    """The reward of each of `answers` [..., tokens], 0 to 1."""
    return (answers < 25).mean(-1)


def arrays(outputs: list[RequestOutput]) -> tuple[np.ndarray, np.ndarray]:
    """The sampled ids and their log-probabilities, each [prompts, samples, tokens]."""
    samples = [[(s.token_ids, s.logprobs) for s in output.outputs] for output in outputs]
    ids = np.array([[tokens for tokens, _ in group] for group in samples])
    own = [[[entry[t].logprob for t, entry in zip(*sample, strict=True)] for sample in group] for group in samples]
    return ids, np.array(own)


def learn(folder: Path, steps: int = STEPS) -> list[float]:
    """Train for `steps` steps, and return the mean reward of each."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model, params = load_model(folder, dtype="float32", load_format="dummy")
    optimizer = optax.adam(5e-2)
    state = optimizer.init(params)

    @jax.jit
    def improve(params: Any, state: Any, whole: jax.Array, advantages: jax.Array) -> tuple[Any, Any, jax.Array]:
        """Take one optimiser step; returns the new weights and state, and the log-probabilities before the step."""

        def objective(params: Any) -> tuple[jax.Array, jax.Array]:
            logprobs = model.logprobs(params, whole)[..., -TOKENS:]
            return -(advantages * logprobs.sum(-1)).mean(), logprobs

        gradients, logprobs = jax.grad(objective, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, logprobs

    sizes = {"max_batch_size": 4, "max_num_tokens": 16, "max_seq_len": 32}
    rewards = []
    with LLM(folder, dtype="float32", load_format="dummy", skip_tokenizer_init=True, **sizes) as llm:
        for step in range(steps):
            llm.update_weights(params)
            sampling = SamplingParams(
                n=SAMPLES, temperature=1.0, max_tokens=TOKENS, logprobs=0, ignore_eos=True, seed=step * SAMPLES
            )
            answers, by_engine = arrays(llm.generate(PROMPTS.tolist(), sampling))
            scores = reward(answers)
            # The baseline is the mean reward of all answers to the same prompt.
            advantages = scores - scores.mean(axis=1, keepdims=True)
            prompts = np.broadcast_to(PROMPTS[:, None], (*answers.shape[:2], PROMPTS.shape[1]))
            whole = np.concatenate([prompts, answers], axis=2)
            params, state, by_trainer = improve(params, state, jnp.asarray(whole), jnp.asarray(advantages))
            rewards.append(float(scores.mean()))
            error = np.abs(by_engine - by_trainer).max()
            print(
                f"step {step:2}: reward {rewards[-1]:.2f}, log-probabilities of engine and trainer within {error:.0e}"
            )
    return rewards


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        learn(Path(folder), *map(int, sys.argv[1:]))
