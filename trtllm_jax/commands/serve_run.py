"""A server from its start to its end: the port, the engine, the frontends, and how they stop."""

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
"""Seconds for a server whose engine failed to send its error answers."""


def run(options: ServerOptions, llm_arguments: Mapping[str, Any]) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code: 0 then, 1 where the engine or the frontends failed.

    `llm_arguments` are those of `LLM`. ValueError where one is wrong, or the port is taken, before a model is
    loaded.
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
                # The frontends close theirs as well: connections are refused now, and a proxy tries another server.
                listening.close()
                logger.info("no more connections are taken; %d sequences are under way", host.unfinished)
                if not frontends.drain(seconds, stop.forced) and not failed:
                    logger.warning(
                        "requests were cut off: they took longer than drain_timeout, or a second signal came"
                    )
            host.close()
            return 1 if failed else 0


@contextlib.contextmanager
def _listening_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address, before the model is loaded: a port in use is an error at once."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host = {host!r} is no address of this machine: {error}") from error
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
        yield listening


class _StopSignals:
    """SIGTERM and SIGINT while the server runs: the first one stops it, the second one forces it to stop at once."""

    def __init__(self) -> None:
        self._count = 0
        self._received = threading.Event()

    def forced(self) -> bool:
        return self._count > 1

    def wait(self, seconds: float) -> bool:
        """Wait for a signal for so many seconds at most; whether one came."""
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
    """Return once a signal asks to stop, or what failed."""
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
