"""`trtllm-serve` as its users have it: several processes, signals, and what happens when one of them dies."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.trtllm_jax.tiny_engine import CACHE, SIZES

ROWS = SIZES["max_batch_size"]
SECONDS = 240
"""No wait of a loaded machine takes longer."""

SERVE = """
import os, sys, time
from trtllm_jax.engine.packer import Packer

step, held = Packer.step, 0

def step_or_fail(self, plan):
    global held
    held = held + 1 if os.path.exists(os.environ["HOLD"]) else 0
    while held > 4 and os.path.exists(os.environ["HOLD"]):
        time.sleep(0.01)
    if os.path.exists(os.environ["FAIL"]):
        raise MemoryError("no room")
    return step(self, plan)

Packer.step = step_or_fail
from trtllm_jax.commands.serve import main
main()
"""


class Serving:
    """A server of its own, whose engine fails once the file `fail` exists, and takes few steps while `hold` does."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.fail, self.hold = folder / "fail", folder / "hold"
        self.log = folder / "log"
        config = folder / "config.yaml"
        given = SIZES | {"max_batch_size": 7, "kv_cache_config": CACHE, "port": 1, "served_model_name": ["tiny", "t"]}
        config.write_text(json.dumps(given))
        arguments = [str(model), "--port=0", f"--config={config}", f"--max-batch-size={ROWS}", *options]
        with self.log.open("w") as log:
            files = {"FAIL": str(self.fail), "HOLD": str(self.hold)}
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, *arguments], stderr=log, env={**os.environ, **files}
            )

    def ready(self) -> "Serving":
        found = until(lambda: re.search(r"is served at http://([\d.]+):(\d+)", self.log.read_text()) or self.ended())
        assert isinstance(found, re.Match), self.log.read_text()
        self.address = (found[1], int(found[2]))
        return self

    def ended(self) -> bool:
        return self.process.poll() is not None

    def frontends(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address[0]}:{self.address[1]}{path}", timeout=SECONDS) as answer:
            return json.loads(answer.read() or b"null")

    @contextmanager
    def post(self, path: str, **body: Any) -> Iterator[http.client.HTTPResponse]:
        with closing(http.client.HTTPConnection(*self.address, timeout=SECONDS)) as connection:
            wanted = json.dumps({"model": "tiny", "prompt": [1, 2, 3], "ignore_eos": True, **body})
            connection.request("POST", path, wanted, {"content-type": "application/json"})
            with connection.getresponse() as answer:
                yield answer

    def complete(self, **body: Any) -> tuple[int, Any]:
        with self.post("/v1/completions", **body) as answer:
            return answer.status, json.loads(answer.read())

    def stream(self, tokens: int, **body: Any) -> "Stream":
        return Stream(self, {"max_tokens": tokens, **body})

    def refuses(self) -> bool:
        try:
            socket.create_connection(self.address).close()
        except ConnectionRefusedError:
            return True
        return False

    def wait(self) -> int:
        return self.process.wait(SECONDS)

    def kill(self) -> None:
        for process in [*self.frontends(), self.process] if not self.ended() else []:
            process.kill()
        self.process.wait()


class Stream:
    """An answer under way, read in a thread of its own."""

    def __init__(self, server: Serving, body: dict[str, Any]) -> None:
        self.text = ""
        self._thread = threading.Thread(target=self._read, args=(server, body), daemon=True)
        self._thread.start()

    def _read(self, server: Serving, body: dict[str, Any]) -> None:
        try:
            with server.post("/v1/completions", stream=True, **body) as answer:
                for line in answer:
                    self.text += line.decode()
        except (OSError, http.client.HTTPException):
            self.text += "CUT"

    def begun(self) -> bool:
        return "data:" in self.text

    def whole(self) -> str:
        self._thread.join(SECONDS)
        return self.text


def until(happened: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (result := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return result


@pytest.fixture(scope="module")
def several(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two frontends; one test has it end."""
    server = Serving(tiny_llama, tmp_path_factory.mktemp("several"), "--num_serve_frontends=2")
    try:
        yield server.ready()
    finally:
        server.kill()


@pytest.fixture
def another(tiny_llama: Path, tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """(*options) -> a server for one test."""
    with ExitStack() as stack:

        def start(*options: str) -> Serving:
            server = Serving(tiny_llama, tmp_path, *options)
            stack.callback(server.kill)
            return server.ready()

        yield start


def test_options_win_over_the_file_and_the_file_over_defaults(several: Serving) -> None:
    assert [card["id"] for card in several.get("/v1/models")["data"]] == ["tiny", "t"]
    several.complete(max_tokens=2)
    stats = until(lambda: several.get("/metrics"))
    assert stats[-1]["maxNumActiveRequests"] == ROWS
    assert stats[-1]["kvCacheStats"]["maxNumBlocks"] == CACHE["max_tokens"] // CACHE["tokens_per_block"]


def test_all_frontends_answer_alike(several: Serving) -> None:
    assert len(several.frontends()) == 2
    answers = [several.complete(max_tokens=20, temperature=0) for _ in range(20)]
    assert {status for status, _ in answers} == {200}
    assert len({body["choices"][0]["text"] for _, body in answers}) == 1


def test_prometheus_sums_over_the_frontends(several: Serving) -> None:
    def count() -> float:
        with urllib.request.urlopen("http://{}:{}/prometheus/metrics".format(*several.address)) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("trtllm_generation_tokens_total{"))

    before = count()
    for _ in range(10):
        several.complete(max_tokens=3)
    assert count() == before + 30


@pytest.mark.slow
def test_a_frontend_that_dies_is_started_again(several: Serving) -> None:
    first = several.frontends()
    cut = several.stream(100)
    until(cut.begun)
    for process in first:
        process.kill()
    cut.whole()
    until(lambda: not {process.pid for process in first} & {process.pid for process in several.frontends()})

    def answered() -> bool:
        try:
            return several.complete(max_tokens=2)[0] == 200
        except OSError:
            return False

    until(answered)


def test_sigterm_lets_answers_end_and_refuses_connections_meanwhile(several: Serving) -> None:
    several.hold.touch()  # so that the answer is under way until the server refuses connections
    stream = several.stream(120, n=40)
    until(stream.begun)
    frontends = several.frontends()
    several.process.send_signal(signal.SIGTERM)
    until(several.refuses)
    assert "[DONE]" not in stream.text
    several.hold.unlink()
    assert several.wait() == 0
    assert stream.whole().rstrip().endswith("data: [DONE]")
    assert "CUT" not in stream.text
    assert not any(process.is_running() for process in frontends)
    assert "Traceback" not in several.log.read_text()


@pytest.mark.slow
def test_an_engine_that_fails_ends_the_server(another: Callable[..., Serving]) -> None:
    failing = another()
    assert failing.get("/health") is None
    failing.fail.touch()
    status, body = failing.complete(max_tokens=2)
    assert (status, body["error"]["type"]) == (503, "service_unavailable_error")
    assert "no room" not in body["error"]["message"]
    assert failing.wait() == 1
    assert "no room" in failing.log.read_text()


@pytest.mark.slow
def test_frontends_do_not_outlive_the_engines_process(another: Callable[..., Serving]) -> None:
    killed = another("--num_postprocess_workers=1")
    frontends = killed.frontends()
    assert len(frontends) == 2
    stream = killed.stream(150)
    until(stream.begun)
    killed.process.kill()
    stream.whole()
    until(lambda: not any(process.is_running() and process.status() != "zombie" for process in frontends))


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from trtllm_jax.commands.serve import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=SECONDS)


def test_a_port_in_use_is_an_error_before_anything_is_loaded(tiny_llama: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = serve("serve", str(tiny_llama), "--host", "127.0.0.1", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert re.fullmatch(r"Error: cannot listen on 127.0.0.1:\d+: Address already in use; .*\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing MODEL"),
        (["a", "--model", "b"], "MODEL = 'a' and --model = 'b' differ"),
        (["a", "--ssl_keyfile", __file__], "trtllm-serve.ssl_certfile is missing"),
        (["a", "--host", "256.1.1.1"], "is not an address of this machine"),
        (["a", "--port", "0", "--pipeline_parallel_size", "2"], "pipeline_parallel_size = 2 is not available"),
        (["a", "--port", "0"], "model 'a': no local folder or file has this name"),
        (["a", "--num_serve_frontends", "65"], "65 is not in the range 1<=x<=64"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str) -> None:
    from click.testing import CliRunner

    from trtllm_jax.commands.serve import command

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
