"""Runs a server: opens the port, starts the engine and the frontends, and stops them."""

import contextlib
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from trtllm_jax.logger import logger, status
from trtllm_jax.serve.config import ServerOptions
from trtllm_jax.serve.processes.frontends import Frontends

POLL_INTERVAL = 0.2
"""Seconds between two checks of the engine and the frontends."""
FAILURE_DRAIN_TIMEOUT = 5.0
"""Seconds in which a server whose engine has failed may still send its error answers."""


def run(options: ServerOptions, llm_arguments: Mapping[str, Any]) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code: 0, or 1 if the engine or the frontends failed.

    `llm_arguments` are those of `LLM`. ValueError before the model is loaded if one is invalid or the port is in use.
    """
    configuration = json.dumps({"llm": dict(llm_arguments), "server": options.model_dump()}).encode()
    with _listening_socket(options.host, options.port) as listening:
        # Imported only now, because importing jax takes a second.
        from trtllm_jax.llmapi.llm import LLM
        from trtllm_jax.remote.host import EngineHost

        with LLM(**llm_arguments) as llm, _StopSignals() as stop:
            host = EngineHost(llm, options.max_queue_size)
            listening.listen(2048)
            with Frontends(host, listening, configuration, options.processes) as frontends:
                frontends.start()
                _announce(listening, options)
                failed = _wait_until_stopped(llm, frontends, stop)
                if failed:
                    logger.error("the server ends: %s", failed)
                seconds = FAILURE_DRAIN_TIMEOUT if failed else options.drain_timeout + 1
                # The frontends close theirs too, so that connections are refused and a proxy tries another server.
                listening.close()
                logger.info("no more connections are accepted; %d sequences have not finished", host.unfinished)
                if not frontends.drain(seconds, stop.forced) and not failed:
                    logger.warning(
                        "requests were cut off: they took longer than drain_timeout, or a second signal came"
                    )
            host.close()
            return 1 if failed else 0


@contextlib.contextmanager
def _listening_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to the address. It is bound before the model is loaded, so that a port in use fails early."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host = {host!r} is not an address of this machine: {error}") from error
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
        yield listening


class _StopSignals:
    """Handles SIGTERM and SIGINT: the first signal stops the server, a second one forces it to stop at once."""

    def __init__(self) -> None:
        self._count = 0
        self._received = threading.Event()

    def forced(self) -> bool:
        return self._count > 1

    def wait(self, seconds: float) -> bool:
        """Wait for a signal for at most `seconds`, and return whether one has come."""
        return self._received.wait(seconds)

    def __enter__(self) -> "_StopSignals":
        def handle(number: int, frame: Any) -> None:
            self._count += 1
            self._received.set()

        self._previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _wait_until_stopped(llm: Any, frontends: Frontends, stop: _StopSignals) -> str | None:
    """Wait for a signal or a failure; the failure's message, or None after a signal."""
    while not stop.wait(POLL_INTERVAL):
        if llm.failure is not None:
            return str(llm.failure)
        try:
            frontends.restart_exited()
        except RuntimeError as failure:
            return str(failure)
    return None


def _announce(listening: socket.socket, options: ServerOptions) -> None:
    host, port = listening.getsockname()[:2]
    scheme = "https" if options.ssl_keyfile else "http"
    address = f"[{host}]" if ":" in host else host
    message = f"trtllm_jax: {options.served_model_name[0]} is served at {scheme}://{address}:{port}"
    status(message)
    if not sys.stderr.isatty():
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
