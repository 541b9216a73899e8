"""Connections that send slowly or endlessly, or never read, over a real uvicorn with short times."""

import asyncio
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn
from openai import InternalServerError, OpenAI

from trtllm_jax.serve.http import connection
from trtllm_jax.serve.http.connection import LimitedHttpProtocol

HEAD = b"GET /%s HTTP/1.1\r\nHost: t\r\n"
SECONDS = 60


class App:
    """/endless is an answer without end; any other path is answered at once."""

    def __init__(self) -> None:
        self.left = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        endless = scope["path"] == "/endless"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")][endless:]})
        if not endless:
            await send({"type": "http.response.body", "body": b"ok"})
            return
        watching = asyncio.create_task(receive_until_left(receive))
        while not watching.done():
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
            await asyncio.sleep(0)
        self.left.set()


async def receive_until_left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def address(app: App, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT", 0.5)
    monkeypatch.setattr(connection, "WRITE_TIMEOUT", 0.5)
    config = uvicorn.Config(app, port=0, log_level="error", http=LimitedHttpProtocol, timeout_keep_alive=SECONDS)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


@pytest.fixture
def client(address: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=SECONDS) as client:
        yield client


def ends(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    data = b""
    try:
        while piece := client.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_silence_ends(client: socket.socket) -> None:
    assert ends(client) == b""


def test_trickling_headers_end(client: socket.socket) -> None:
    def trickle() -> None:
        try:
            for byte in itertools.chain(HEAD % b"" + b"X: ", itertools.repeat(ord("x"))):
                client.sendall(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            pass

    thread = threading.Thread(target=trickle)
    thread.start()
    assert ends(client) == b""
    thread.join()


def test_a_kept_connection_ends_even_if_something_trickles(client: socket.socket) -> None:
    client.sendall(HEAD % b"" + b"\r\n")
    assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
    client.sendall(HEAD % b"")
    assert ends(client).removeprefix(b"ok") == b""


def test_a_connection_is_used_again(client: socket.socket) -> None:
    for _ in range(20):
        time.sleep(0.03)  # together longer than the limit
        client.sendall(HEAD % b"" + b"\r\n")
        answer = b""
        while not answer.endswith(b"ok"):
            answer += client.recv(1 << 16)


@pytest.mark.parametrize(
    "endless", [b"GET /" + b"x" * 200_000, HEAD % b"" + b"X: " + b"x" * 200_000], ids=["line", "header"]
)
def test_headers_without_end_are_refused(client: socket.socket, endless: bytes) -> None:
    client.sendall(endless[:70_000])
    assert ends(client).startswith(b"HTTP/1.1 431 ")


def test_headers_of_a_sane_size_are_not(client: socket.socket) -> None:
    client.sendall(HEAD % b"" + b"X: " + b"x" * 60_000 + b"\r\n\r\n")
    assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_who_never_reads_is_cut_off(client: socket.socket, app: App) -> None:
    client.sendall(HEAD % b"endless" + b"\r\n")
    assert app.left.wait(SECONDS)


@pytest.mark.slow
def test_who_reads_is_not(client: socket.socket, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_TIMEOUT", 3.0)  # a busy machine keeps the reader waiting, too
    client.sendall(HEAD % b"endless" + b"\r\n")
    until = time.monotonic() + 7
    while time.monotonic() < until:
        assert client.recv(1 << 20)
    assert not app.left.is_set()


def test_connections_beyond_the_bound_are_refused(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch, client: socket.socket
) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT", SECONDS)
    monkeypatch.setattr(LimitedHttpProtocol, "max_connections", 4)
    with ExitStack() as stack:
        others = [stack.enter_context(socket.create_connection(address, timeout=SECONDS)) for _ in range(5)]
        heads = [ends(other).partition(b"\r\n")[0] for other in others[3:]]
        assert heads == [b"HTTP/1.1 503 Service Unavailable"] * 2
        for other in others[:3]:
            other.sendall(HEAD % b"" + b"\r\n")
            assert other.recv(1 << 16).startswith(b"HTTP/1.1 200")
    again = b""
    while not again.startswith(b"HTTP/1.1 200"):  # the closed ones are forgotten a moment later
        with socket.create_connection(address, timeout=SECONDS) as late:
            late.sendall(HEAD % b"" + b"\r\n")
            again = late.recv(1 << 16)


def test_a_refusal_is_an_error_as_clients_know_it(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LimitedHttpProtocol, "max_connections", 0)
    host, port = address
    client = OpenAI(base_url=f"http://{host}:{port}/v1", api_key="x", max_retries=0)
    with client, pytest.raises(InternalServerError) as refused:
        client.models.list()
    assert (refused.value.status_code, refused.value.code) == (503, "unavailable")


@pytest.mark.parametrize("soft", [200, 300])
def test_as_many_files_are_opened_as_may_be(soft: int) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, 300))\n"
        "from trtllm_jax.serve.http.connection import connection_limit as room\n"
        "print(room(), resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["236", "(300, 300)\n"]
