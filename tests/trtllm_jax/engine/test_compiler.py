"""Programs that are compiled beside whatever runs, with a compiler that waits to be told."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any

import pytest

from trtllm_jax.engine.compiler import THREADS, Compiler

SECONDS = 60


class Held:
    """Programs whose compilation ends when a test lets it."""

    def __init__(self, *names: str, failing: str | None = None) -> None:
        self.order: list[str] = []
        self.begun = {name: threading.Event() for name in names}
        self.let = {name: threading.Event() for name in names}
        self.failing = failing
        self.compiler = Compiler({(name,): lambda name=name: self._lowered(name) for name in names}, lambda key: None)

    def _lowered(self, name: str) -> Any:
        def compile(options: object) -> Any:
            self.order.append(name)
            self.begun[name].set()
            assert self.let[name].wait(SECONDS)
            if name == self.failing:
                raise MemoryError(name)
            return name

        return SimpleNamespace(compile=compile)

    def release(self, *names: str) -> None:
        for name in names or self.let:
            self.let[name].set()


def test_what_is_waited_for_comes_before_what_is_not_begun() -> None:
    held = Held("a", "b", "c", "d")
    held.compiler.start([("a",), ("b",), ("c",), ("d",)], threads=1)
    assert held.begun["a"].wait(SECONDS)
    held.release("b", "c", "d")
    assert held.compiler["c",] == "c"
    assert "b" not in held.order[: held.order.index("c")]
    held.release("a")
    held.compiler.join()
    assert sorted(held.order) == ["a", "b", "c", "d"]
    assert all(held.compiler.ready((name,)) for name in "abcd")


def test_each_is_compiled_once_for_all_who_wait() -> None:
    held = Held("a")
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(held.compiler["a",])) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert held.begun["a"].wait(SECONDS)
    held.release()
    for thread in threads:
        thread.join(SECONDS)
    assert (found, held.order) == (["a"] * 4, ["a"])


def test_progress_counts_what_is_waited_for() -> None:
    held = Held("a", "b")
    held.release()
    told: list[tuple[int, int]] = []
    held.compiler.compile([("a",), ("b",)], lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_a_failure_reaches_who_needs_the_program_and_nobody_else() -> None:
    held = Held("a", "b", failing="a")
    held.release()
    held.compiler.start([("a",), ("b",)], threads=1)
    with pytest.raises(MemoryError, match="a"):
        held.compiler["a",]
    assert held.compiler["b",] == "b"


def test_closing_waits_for_what_is_begun_and_drops_the_rest() -> None:
    held = Held("a", "b")
    _, second = held.compiler.start([("a",), ("b",)], threads=1)
    assert held.begun["a"].wait(SECONDS)
    closing = threading.Thread(target=held.compiler.close)
    closing.start()
    with pytest.raises(CancelledError):
        second.result(SECONDS)
    assert closing.is_alive()
    held.release()
    closing.join(SECONDS)
    assert not closing.is_alive()
    assert held.order == ["a"]


def test_closing_ends_the_wait_for_several() -> None:
    names = [str(number) for number in range(THREADS + 1)]
    held = Held(*names)
    keys = [(name,) for name in names]
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(CancelledError):
            held.compiler.compile(keys, lambda done, total: None)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    assert all(held.begun[name].wait(SECONDS) for name in names[:-1])
    closing = threading.Thread(target=held.compiler.close)
    closing.start()
    assert ended.wait(SECONDS)
    held.release()
    closing.join(SECONDS)
    assert sorted(held.order) == sorted(names[:-1])


def test_what_is_asked_for_after_the_end_is_refused_at_once() -> None:
    held = Held("a", "b", "c")
    held.release("a")
    assert held.compiler["a",] == "a"
    held.compiler.close()
    (late,) = held.compiler.start([("b",)])
    assert late.cancelled()
    with pytest.raises(CancelledError):
        held.compiler.compile([("a",), ("b",)], lambda done, total: None)
    with pytest.raises(CancelledError):
        held.compiler["c",]
    assert (held.compiler["a",], held.order) == ("a", ["a"])
