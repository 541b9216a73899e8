"""`Frontends`: the frontend processes of a server, which are started, restarted and drained."""

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from trtllm_jax.logger import logger
from trtllm_jax.remote.host import EngineHost

START_TIMEOUT = 120
SHORT_LIFETIME = 10
MAX_SHORT_LIFETIMES = 3
"""Frontends that end this often, this soon after their start, are not started again."""


class Frontends:
    """`count` processes that take connections from one listening socket and share one engine.

    A context manager: leaving it ends the processes at once. Used from one thread.

    Args:
        host: the engine.
        listening: bound and listening.
        configuration: what each reads when it starts.
        count: processes.
    """

    def __init__(self, host: EngineHost, listening: socket.socket, configuration: bytes, count: int) -> None:
        self._host = host
        self._listening = listening
        self._configuration = configuration
        self._count = count
        self._processes: list[_Frontend] = []
        self._short_lifetimes = 0
        self._metrics = tempfile.TemporaryDirectory(prefix="trtllm_jax-metrics-")

    def start(self) -> None:
        """Start all processes, and return once they answer; RuntimeError where one ends or hangs instead."""
        self._processes = [self._start_process() for _ in range(self._count)]
        for process in self._processes:
            process.wait_until_ready()

    def restart_exited(self) -> None:
        """Start the processes again that have ended; RuntimeError where they keep ending."""
        for index, process in enumerate(self._processes):
            code = process.exit_code
            if code is None:
                continue
            self._short_lifetimes = self._short_lifetimes + 1 if process.age < SHORT_LIFETIME else 0
            if self._short_lifetimes >= MAX_SHORT_LIFETIMES:
                raise RuntimeError(f"frontends end as soon as they start, the last one with exit code {code}")
            logger.warning("frontend %d ended with exit code %d and is started again", process.pid, code)
            self._remove_gauges(process.pid)
            self._processes[index] = self._start_process()

    def drain(self, timeout: float, should_abort: Callable[[], bool]) -> bool:
        """Stop taking connections, and wait until all requests have ended; whether all processes have.

        False after `timeout` seconds, or as soon as `should_abort` returns true.
        """
        for process in self._processes:
            process.signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while any(process.exit_code is None for process in self._processes):
            if time.monotonic() > deadline or should_abort():
                return False
            time.sleep(0.02)
        return True

    def kill(self) -> None:
        """End the processes at once."""
        for process in self._processes:
            process.signal(signal.SIGKILL)
            process.wait()
        self._processes = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self._metrics.cleanup()

    def _start_process(self) -> "_Frontend":
        ours, theirs = socket.socketpair()
        with theirs:
            process = _Frontend(theirs, self._listening, self._configuration, self._metrics.name)
        self._host.connect(ours)
        return process

    def _remove_gauges(self, pid: int) -> None:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(pid, self._metrics.name)


class _Frontend:
    """One process."""

    def __init__(self, engine: socket.socket, listening: socket.socket, configuration: bytes, metrics: str) -> None:
        self._started = time.monotonic()
        numbers = (engine.fileno(), listening.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trtllm_jax.serve.processes.frontend", *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=numbers,
            # Ctrl-C is meant for the parent process, which then drains the frontends.
            start_new_session=True,
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": metrics},
        )
        assert self._process.stdin is not None
        self._process.stdin.write(configuration)
        self._process.stdin.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait_until_ready(self) -> None:
        """RuntimeError where the process ends first, or takes too long."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(START_TIMEOUT):
                raise RuntimeError(f"a frontend did not start in {START_TIMEOUT} s")
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"a frontend did not start: exit code {self._process.wait()}, see above")

    def signal(self, number: signal.Signals) -> None:
        if self.exit_code is None:
            self._process.send_signal(number)

    def wait(self) -> None:
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
