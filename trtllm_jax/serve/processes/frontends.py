"""The frontend processes of a server: started, watched, started again, and drained."""

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

START_SECONDS = 120
SHORT_LIFE_SECONDS = 10
MAX_SHORT_LIVES = 3
"""A frontend that ends this often, this soon after its start, will not do better."""


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
        self._short_lives = 0
        self._metrics = tempfile.TemporaryDirectory(prefix="trtllm_jax-metrics-")

    def start(self) -> None:
        """All of them answer when this returns. RuntimeError where one ends or hangs instead."""
        self._processes = [self._new() for _ in range(self._count)]
        for process in self._processes:
            process.wait_until_ready()

    def look(self) -> None:
        """Start anew what has ended. RuntimeError where that does not help."""
        for index, process in enumerate(self._processes):
            code = process.exit_code
            if code is None:
                continue
            self._short_lives = self._short_lives + 1 if process.age < SHORT_LIFE_SECONDS else 0
            if self._short_lives >= MAX_SHORT_LIVES:
                raise RuntimeError(f"frontends end as soon as they start, the last one with exit code {code}")
            logger.warning("frontend %d ended with exit code %d and is started again", process.pid, code)
            self._forget_gauges(process.pid)
            self._processes[index] = self._new()

    def drain(self, seconds: float, insisted: Callable[[], bool]) -> bool:
        """Have them take no more connections and end once their requests have; whether all did.

        False after `seconds`, or as soon as `insisted` says that nobody wants to wait.
        """
        for process in self._processes:
            process.signal(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while any(process.exit_code is None for process in self._processes):
            if time.monotonic() > deadline or insisted():
                return False
            time.sleep(0.02)
        return True

    def kill(self) -> None:
        """End them now."""
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

    def _new(self) -> "_Frontend":
        ours, theirs = socket.socketpair()
        with theirs:
            process = _Frontend(theirs, self._listening, self._configuration, self._metrics.name)
        self._host.connect(ours)
        return process

    def _forget_gauges(self, pid: int) -> None:
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
            # A Ctrl-C is for the process that started it, which then says how to stop.
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
        """RuntimeError where it ends before, or takes too long."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(START_SECONDS):
                raise RuntimeError(f"a frontend did not start in {START_SECONDS} s")
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"a frontend did not start: exit code {self._process.wait()}, see above")

    def signal(self, number: signal.Signals) -> None:
        if self.exit_code is None:
            self._process.send_signal(number)

    def wait(self) -> None:
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
