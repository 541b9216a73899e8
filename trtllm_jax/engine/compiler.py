"""Compiles programs beside whatever else runs: what is needed first before the rest, each once."""

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from typing import Any

import jax

from trtllm_jax.engine import compilation_cache

Compiled = Callable[..., Any]
Key = tuple[Hashable, ...]

THREADS = max(4, min(os.cpu_count() or 1, 16))
"""Compiling does not hold the interpreter lock, and uses a core or two a program."""


class Compiler:
    """Programs by key; may be used from several threads.

    Args:
        lowerings: how each is lowered.
        options: XLA's for each.
    """

    def __init__(
        self,
        lowerings: Mapping[Key, Callable[[], jax.stages.Lowered]],
        options: Callable[[Key], dict[str, Any] | None],
    ) -> None:
        self._lowerings = lowerings
        self._options = options
        self._programs: dict[Key, Future[Compiled]] = {}
        self._ready: dict[Key, Compiled] = {}
        """What is compiled, because a step asks often and a future takes a lock."""
        self._waiting: list[Key] = []
        self._lock = threading.Lock()
        self._lowering = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._working = 0
        """Threads that will look again whether anything waits."""
        self._closed = False

    def start(self, keys: Iterable[Key], threads: int = THREADS) -> list[Future[Compiled]]:
        """Have these compiled in up to so many threads, in this order; those that are known no second time."""
        with self._lock:
            new = [key for key in dict.fromkeys(keys) if key not in self._programs]
            self._programs |= {key: Future() for key in new}
            if self._closed:
                self._cancel(new)
            else:
                self._waiting += new
                self._work_on(threads)
            return [self._programs[key] for key in keys]

    def compile(self, keys: Sequence[Key], progress: Callable[[int, int], None]) -> None:
        """Compile these and return; `progress` is called with the number compiled so far, and of all."""
        for done, future in enumerate(as_completed(self.start(keys)), start=1):
            future.result()
            progress(done, len(keys))

    def __getitem__(self, key: Key) -> Compiled:
        """A program; waits for it where it is not compiled, and only for what is begun before it."""
        if (program := self._ready.get(key)) is not None:
            return program
        with self._lock:
            future = self._programs.setdefault(key, Future())
            if self._closed:
                self._cancel([key])
            elif not future.running() and not future.done():
                self._waiting = [key, *(other for other in self._waiting if other != key)]
                self._work_on(self._working + 1)
        return future.result()

    def join(self) -> None:
        """Return when nothing is left to compile, and JAX's compilation cache is the user's again."""
        for thread in list(self._threads):
            thread.join()

    def ready(self, key: Key) -> bool:
        """Whether a program could run at once."""
        return key in self._ready

    def close(self) -> None:
        """Compile nothing more; waits for what the compiler has begun, because it calls back into Python."""
        with self._lock:
            self._closed = True
            self._cancel(self._waiting)
            self._waiting.clear()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _cancel(self, keys: Iterable[Key]) -> None:
        """Tell who waits for these that they will not be compiled, unless they are or are begun."""
        for key in keys:
            future = self._programs[key]
            if not future.done() and future.cancel():
                future.set_running_or_notify_cancel()  # without it `as_completed` goes on waiting

    def _work_on(self, threads: int) -> None:
        """Have at most so many threads for what waits; the lock is the caller's to hold."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        while self._working < min(threads, len(self._waiting)) and not self._closed:
            # Daemons, so that a Python that exits without closing the engine does not wait for unused programs.
            thread = threading.Thread(target=self._work, name="trtllm_jax-compiler", daemon=True)
            self._threads.append(thread)
            self._working += 1
            thread.start()

    def _work(self) -> None:
        """Compile until nothing waits."""
        with compilation_cache.kept():
            while (key := self._next()) is not None:
                future = self._programs[key]
                try:
                    with self._lowering:  # one at a time traces faster than several that wait for the interpreter
                        lowered = self._lowerings[key]()
                    self._ready[key] = lowered.compile(self._options(key))
                    future.set_result(self._ready[key])
                except BaseException as failure:
                    future.set_exception(failure)

    def _next(self) -> Key | None:
        with self._lock:
            if not self._waiting:
                self._working -= 1
                return None
            key = self._waiting.pop(0)
            self._programs[key].set_running_or_notify_cancel()
            return key
