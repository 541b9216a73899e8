"""Two servers behind HAProxy, watched by Prometheus, lose one after the other under load: no client may notice.

    apt-get install haproxy prometheus
    pip install '.[serve]' openai
    python deploy/try_failover.py

It takes the files of this folder as they are, with free ports, and a tiny model of random weights unless MODEL names
another. Exit code 0 where everything that the table says is so.
"""

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from failover_load import Load
from failover_processes import HERE, Process, Prometheus, Proxy, get, server, until

RESTART_SECONDS = 2.0
"""As RestartSec of trtllm-serve@.service."""
ENGINE = ["--max_num_tokens", "16", "--max_batch_size", "4", "--served_model_name", "model", "--drain_timeout", "60"]
BEFORE_ERRORS = ("trtllm_request_error_total",)
"""Metrics that have no series until a request failed."""


class Trial:
    """What was claimed, and whether it was so."""

    def __init__(self) -> None:
        self.failed = 0

    def claim(self, so: object, what: str) -> None:
        """Note one claim."""
        self.failed += not so
        print(f"  {'ok    ' if so else 'FAILED'}  {what}", flush=True)

    def tool(self, *command: str) -> None:
        """Claim that a checking tool is content."""
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        self.claim(done.returncode == 0, " ".join(command))
        if done.returncode:
            print(done.stdout + done.stderr)

    def calls(self, load: Load, since: float, cut_allowed: bool) -> None:
        """Claim that the clients saw no failure since a server went, at `since`."""
        calls = load.since(since)
        counts = {outcome: sum(call.outcome == outcome for call in calls) for outcome in ("whole", "cut", "failed")}
        in_flight = sum(call.began < since for call in calls)
        retried = sum(call.retries for call in calls)
        self.claim(in_flight, f"{in_flight} requests were under way when the server went")
        self.claim(
            counts["whole"] and not counts["failed"],
            f"{len(calls)} requests since: {counts['whole']} whole, {counts['failed']} failed, {retried} of them sent"
            f" a second time by the client; the slowest took {max(call.seconds for call in calls):.1f} s",
        )
        cut = [call for call in calls if call.outcome == "cut"]
        in_time = all(call.began < since for call in cut)
        if cut_allowed:
            self.claim(in_time, f"{len(cut)} streams that had begun were cut, and none that began later")
        else:
            self.claim(not cut, f"{len(cut)} streams were cut")
        for problem in {call.problem for call in calls if call.problem}:
            print(f"          {problem}")


def main() -> int:
    """Check the files, start everything, lose servers, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model folder or .gguf file  [a tiny one of random weights]")
    parser.add_argument("--clients", type=int, default=4, help="that call at once  [4]")
    parser.add_argument("--tokens", type=int, default=600, help="of each answer  [600]")
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs  [a temporary one]")
    options = parser.parse_args()
    trial = Trial()
    print("Files")
    trial.tool("haproxy", "-c", "-f", "haproxy.cfg")
    trial.tool("promtool", "check", "config", "prometheus.yml")
    trial.tool("promtool", "test", "rules", "rules_test.yml")
    with contextlib.ExitStack() as stack:
        folder = options.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="failover-")))
        folder.mkdir(parents=True, exist_ok=True)
        arguments = [options.model] if options.model else [*tiny_model(folder / "model"), "--dtype", "float32"]
        arguments += [*ENGINE, "--max_seq_len", "2048", "--config", str(kv_cache(folder))]

        def started(process: Process) -> Process:
            stack.callback(process.end)
            return process

        print("Start")
        a, b = (started(server(name, arguments, folder)) for name in "ab")
        proxy = Proxy(a, b, folder)
        started(proxy)
        prometheus = Prometheus({"trtllm": [a.port, b.port], "haproxy": [proxy.figures_port]}, folder)
        started(prometheus)
        for one in (a, b):
            until(lambda one=one: one.answers("/health"), f"server {one.name} answers")
            until(lambda one=one: proxy.up(one.name), f"HAProxy sends requests to {one.name}", 20)
            seen = f'up{{job="trtllm", instance="127.0.0.1:{one.port}"}} == 1'
            until(lambda seen=seen: prometheus.series(seen), f"Prometheus sees {one.name}", 30)
        load = Load(f"http://127.0.0.1:{proxy.port}/v1", options.clients, options.tokens)
        leaving(trial, load, (a, b))
        with load:
            began = time.monotonic()
            time.sleep(5)
            trial.claim(
                all(call.outcome == "whole" for call in load.calls) and load.calls,
                f"{len(load.calls) / (time.monotonic() - began):.1f} requests/s of {options.clients} clients",
            )
            kill = signal.SIGKILL
            lose(trial, load, proxy, a, "kill -9 of the main process", lambda: a.tell(kill), prometheus)
            lose(trial, load, proxy, b, "kill -9 of all processes", lambda: b.tell(kill, everybody=True))
            lose(trial, load, proxy, a, "SIGTERM", lambda: a.tell(signal.SIGTERM), drained=True)
            trial.claim(proxy.repeated(), f"HAProxy sent {proxy.repeated():.0f} requests in all to the other server")
        print("Dashboard")
        dashboard(trial, prometheus)
    print(f"{trial.failed} claims failed" if trial.failed else "All is well")
    return 1 if trial.failed else 0


def leaving(trial: Trial, load: Load, servers: tuple[Process, ...]) -> None:
    """Claim that a client that leaves HAProxy has left the server."""

    def left() -> float:
        texts = [get(process.port, "/prometheus/metrics") or "" for process in servers]
        errors = re.findall(r'^trtllm_request_error_total{.*status="499"} (\S+)$', "\n".join(texts), re.MULTILINE)
        return sum(map(float, errors))

    load.leave_early()
    seconds = until(lambda: left() == 2, "the servers know that both clients left", 20)
    trial.claim(True, f"clients that leave, streaming or waiting, are known to have left {seconds:.1f} s later")


def lose(
    trial: Trial,
    load: Load,
    proxy: Proxy,
    process: Process,
    how: str,
    end: Callable[[], None],
    prometheus: Prometheus | None = None,
    drained: bool = False,
) -> None:
    """Have a server end under load, and come back."""
    print(f"{how}, server {process.name}")
    went = time.monotonic()
    end()
    noticed = until(lambda: not proxy.up(process.name), "HAProxy notices", 20)
    code = process.wait()
    if drained:
        trial.claim(code == 0, f"exit code {code} after {time.monotonic() - went:.1f} s")
    trial.claim(True, f"HAProxy sends it nothing {noticed:.1f} s later")
    if prometheus is not None:
        fires = until(lambda: prometheus.firing("EngineDown", process.port), "EngineDown fires", 60)
        trial.claim(True, f"EngineDown fires for it after {noticed + fires:.0f} s")
    time.sleep(RESTART_SECONDS)
    again = time.monotonic()
    process.start()
    until(lambda: process.answers("/health"), f"server {process.name} answers again")
    up = time.monotonic() - again
    before = proxy.answered(process.name)
    until(lambda: proxy.answered(process.name) >= before + 5, f"server {process.name} has work again", 60)
    trial.claim(True, f"started again it answers after {up:.0f} s, and has its share of the load")
    if prometheus is not None:
        gone = until(lambda: not prometheus.firing("EngineDown", process.port), "EngineDown ends", 60)
        trial.claim(True, f"EngineDown ends {gone:.0f} s later")
    trial.calls(load, went, cut_allowed=not drained)


def dashboard(trial: Trial, prometheus: Prometheus) -> None:
    """Claim that every expression of the dashboard has values in the Prometheus that watched."""
    panels = json.loads((HERE / "dashboard.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    variables = {"$model": ".*", "$instance": ".*", "$__rate_interval": "1m"}
    empty = []
    for expression in expressions:
        asked = expression
        for name, value in variables.items():
            asked = asked.replace(name, value)
        series = prometheus.series(asked)
        if series is None or (series == 0 and not any(name in expression for name in BEFORE_ERRORS)):
            empty.append(expression)
    trial.claim(not empty, f"{len(expressions)} expressions are understood, and have values")
    for expression in empty:
        print(f"          {expression}")


def tiny_model(folder: Path) -> list[str]:
    """The arguments for a Llama of two layers whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(exist_ok=True)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "vocab_size": 256}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(shape | rest | kind))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return [str(folder), "--load_format", "dummy"]


def kv_cache(folder: Path) -> Path:
    """A small one."""
    path = folder / "engine.yaml"
    path.write_text("kv_cache_config: {max_tokens: 16384}\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
