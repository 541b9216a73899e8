"""The processes of the trial: servers, HAProxy and Prometheus, each with its log, all ended at the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
START_SECONDS = 600
"""The first start on a busy machine compiles everything."""


def until(happened: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> float:
    """The seconds until `happened`; TimeoutError where it does not."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - began


def free_port() -> int:
    """A port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def get(port: int, path: str) -> str | None:
    """The answer's text; None where nobody answers with 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return None


class Process:
    """A command on a port of its own, with its output in `logs`."""

    def __init__(self, name: str, command: list[str], port: int, logs: Path, **environment: str) -> None:
        self.name = name
        self.port = port
        self._command = command
        self._log = logs / f"{name}.log"
        self._environment = environment
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env={**os.environ, **self._environment}
            )

    def running(self) -> bool:
        """Whether it does."""
        return self._process.poll() is None

    def answers(self, path: str) -> bool:
        """Whether it does with 200. RuntimeError where it has ended instead."""
        if not self.running():
            raise RuntimeError(f"{self.name} ended with {self._process.returncode}:\n{self._log.read_text()[-2000:]}")
        return get(self.port, path) is not None

    def tell(self, number: signal.Signals, everybody: bool = False) -> None:
        """Send a signal to the main process, or to its children as well."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if everybody else []
        for process in (pid, *map(int, children)):
            os.kill(process, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit code."""
        return self._process.wait(seconds)

    def end(self) -> None:
        """At once, where it still runs."""
        if self.running():
            self.tell(signal.SIGKILL, everybody=True)
            self.wait()


def server(name: str, arguments: list[str], logs: Path) -> Process:
    """`trtllm-serve` with these arguments."""
    port = free_port()
    command = [sys.executable, "-c", "from trtllm_jax.commands.serve import main; main()", *arguments]
    return Process(name, [*command, "--port", str(port)], port, logs)


class Proxy(Process):
    """HAProxy with haproxy.cfg as it is, before two servers."""

    def __init__(self, a: Process, b: Process, logs: Path) -> None:
        self._figures = free_port()
        listen = free_port()
        addresses = {"LISTEN": listen, "FIGURES": self._figures, "ENGINE_A": a.port, "ENGINE_B": b.port}
        named = {f"SERVE_{name}": f"127.0.0.1:{port}" for name, port in addresses.items()}
        super().__init__("haproxy", ["haproxy", "-db", "-f", str(HERE / "haproxy.cfg")], listen, logs, **named)

    @property
    def figures_port(self) -> int:
        """Where Prometheus asks."""
        return self._figures

    def up(self, name: str) -> bool:
        """Whether HAProxy sends requests to a server."""
        return self._figure(f'haproxy_server_status{{proxy="engines",server="{name}",state="UP"}}') == 1

    def answered(self, name: str) -> float:
        """How many requests a server has answered with 2xx."""
        return self._figure(f'haproxy_server_http_responses_total{{proxy="engines",server="{name}",code="2xx"}}')

    def repeated(self) -> float:
        """How many requests HAProxy has sent to another server after the first."""
        return self._figure('haproxy_backend_redispatch_warnings_total{proxy="engines"}')

    def _figure(self, series: str) -> float:
        lines = (get(self._figures, "/metrics") or "").splitlines()
        return sum(float(line.removeprefix(series)) for line in lines if line.startswith(f"{series} "))


class Prometheus(Process):
    """Prometheus with prometheus.yml and rules.yml, but these targets."""

    def __init__(self, targets: dict[str, list[int]], folder: Path) -> None:
        told = yaml.safe_load((HERE / "prometheus.yml").read_text())
        for job in told["scrape_configs"]:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in targets[job["job_name"]]]}]
        told["rule_files"] = [str(HERE / "rules.yml")]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(told))
        port = free_port()
        options = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data"}
        command = [f"--{name}={value}" for name, value in options.items()]
        super().__init__("prometheus", ["prometheus", *command, f"--web.listen-address=127.0.0.1:{port}"], port, folder)

    def firing(self, alert: str, port: int) -> bool:
        """Whether an alert fires for the server of a port."""
        alerts = json.loads(get(self.port, "/api/v1/alerts") or '{"data": {"alerts": []}}')["data"]["alerts"]
        wanted = {"alertname": alert, "instance": f"127.0.0.1:{port}"}
        return any(one["state"] == "firing" and wanted.items() <= one["labels"].items() for one in alerts)

    def series(self, expression: str) -> int | None:
        """How many an expression has now, None where it is wrong."""
        answer = get(self.port, "/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        return None if answer is None else len(json.loads(answer)["data"]["result"])
