"""A server from its start to its end: the port, the engine, the frontends, and who stops what."""

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

LOOK_AGAIN = 0.2
"""Seconds between two looks at engine and frontends."""
SHORT_DRAIN = 5.0
"""Seconds for the error answers of a server whose engine failed."""


def run(options: ServerOptions, llm_arguments: Mapping[str, Any]) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code: 0 then, 1 where the engine or the frontends failed.

    `llm_arguments` are those of `LLM`. ValueError where one is wrong, or the port cannot be had: before a model is
    loaded.
    """
    configuration = json.dumps({"llm": dict(llm_arguments), "server": options.model_dump()}).encode()
    with _bound(options.host, options.port) as listening:
        # Only now: importing jax takes a second, and loading a model minutes.
        from trtllm_jax.llmapi.llm import LLM
        from trtllm_jax.remote.host import EngineHost

        with LLM(**llm_arguments) as llm, _Stop() as stop:
            host = EngineHost(llm, options.max_queue_size)
            listening.listen(2048)
            with Frontends(host, listening, configuration, options.processes) as frontends:
                frontends.start()
                _announce(listening, options)
                failed = _watch(llm, frontends, stop)
                if failed:
                    logger.error("the server ends: %s", failed)
                seconds = SHORT_DRAIN if failed else options.drain_timeout + 1
                # The frontends close theirs: from now on connections are refused, and a proxy tries another server.
                listening.close()
                logger.info("no more connections are taken; %d sequences are under way", host.unfinished)
                if not frontends.drain(seconds, stop.insisted) and not failed:
                    logger.warning(
                        "requests were cut off: they took longer than drain_timeout, or a second signal came"
                    )
            host.close()
            return 1 if failed else 0


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
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


class _Stop:
    """SIGTERM and SIGINT while the server runs: the first asks to stop, the second insists."""

    def __init__(self) -> None:
        self._times = 0
        self._happened = threading.Event()

    def insisted(self) -> bool:
        return self._times > 1

    def wait(self, seconds: float) -> bool:
        """Whether somebody asked, which ends the wait."""
        return self._happened.wait(seconds)

    def __enter__(self) -> "_Stop":
        def note(number: int, frame: Any) -> None:
            self._times += 1
            self._happened.set()

        self._before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _watch(llm: Any, frontends: Frontends, stop: _Stop) -> str | None:
    """Returns when somebody asks to stop, or with what failed."""
    while not stop.wait(LOOK_AGAIN):
        if llm.failure is not None:
            return str(llm.failure)
        try:
            frontends.look()
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
