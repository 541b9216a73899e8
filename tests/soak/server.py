"""A real `trtllm-serve` of a tiny random model, for tests that look at its processes from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[2]
SECONDS = 240
"""No start or end takes longer."""

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}\n{% endfor %}assistant:"


def make_model(folder: Path) -> Path:
    """A Hugging Face folder without weights (load_format "dummy" makes them) whose tokens are the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 258, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 257, "eos_token_id": 256,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": TEMPLATE}))
    return folder


class Server:
    """The command, from its start to its end; a context manager that waits until it serves, and has it end by SIGTERM.

    Args:
        folder: for the model and the log.
        options: of the command, besides those that make it small.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        model = folder / "tiny"
        model.mkdir()
        self.folder = folder
        self.log = folder / "log"
        config = folder / "config.yaml"
        config.write_text("kv_cache_config: {max_tokens: 4096, tokens_per_block: 16}\n")
        small = ["--max_num_tokens=16", "--max_batch_size=4", "--dtype=float32", "--load_format=dummy"]
        command = [
            "-c",
            "from trtllm_jax.commands.serve import main; main()",
            str(make_model(model)),
            "--port=0",
            f"--config={config}",
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, *small, *options],
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{Path(__file__).parent / 'inside'}:{ROOT}",
                    "SOAK_FOLDER": str(folder),
                    "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": "",
                },
            )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + SECONDS
        while not (found := re.search(r"is served at http://([\d.]+):(\d+)", self.log.read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.05)
        self.host, self.port = found[1], int(found[2])
        self._lasting = [psutil.Process(self.process.pid), *self._children()]
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(SECONDS)
        finally:
            for process in [*self._children(), self.process] if self.process.poll() is None else []:
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """The engine's, then the frontends', as they were when they began to serve."""
        return self._lasting

    def passing(self) -> list[psutil.Process]:
        """Children that the engine has started since; it tries a new constraint in one."""
        return [child for child in self._children() if child not in self._lasting]

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def tasks(self) -> list[str]:
        """The coroutines that are under way in the frontends, by name."""
        names = []
        for process in self.processes()[1:]:
            answer = self.folder / f"tasks-{process.pid}"
            answer.unlink(missing_ok=True)
            process.send_signal(signal.SIGUSR1)
            deadline = time.monotonic() + SECONDS
            while not answer.exists():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the frontend {process.pid} hangs")
                time.sleep(0.01)
            names += answer.read_text().splitlines()
        return names

    def get(self, path: str) -> bytes:
        """An answer's body."""
        with urllib.request.urlopen(f"http://{self.host}:{self.port}{path}", timeout=SECONDS) as answer:
            return answer.read()  # type: ignore[no-any-return]

    def complete(self, **body: Any) -> str:
        """A completion's text, of the greedy kind unless `body` says otherwise."""
        wanted = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "temperature": 0, "ignore_eos": True, **body}
        request = urllib.request.Request(
            f"http://{self.host}:{self.port}/v1/completions",
            json.dumps(wanted).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return str(json.loads(answer.read())["choices"][0]["text"])
