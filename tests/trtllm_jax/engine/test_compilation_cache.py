"""Compiled programs on the disk, by JAX itself: it reads what we keep, and what it cannot read is replaced."""

from __future__ import annotations

import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from trtllm_jax import LLM
from trtllm_jax.engine import compilation_cache

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where programs are kept if the user names no place."""
    for thread in threading.enumerate():
        if thread.name == "trtllm_jax-compiler":  # of an engine that other tests share
            thread.join()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = [getattr(jax.config, name) for name in NAMES]
    jax.config.update(NAMES[0], None)
    jax.config.update(NAMES[1], 1.0)  # JAX's own rule, which the session's cache of the tests has not
    reset_cache()
    yield tmp_path / "trtllm_jax" / "xla"
    for name, value in zip(NAMES, before, strict=True):
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture
def events() -> Iterator[list[str]]:
    heard: list[str] = []

    def listen(event: str, **kwargs: object) -> None:
        if event in (HIT, MISS):
            heard.append(event)

    jax.monitoring.register_event_listener(listen)
    yield heard
    jax.monitoring.unregister_event_listener(listen)


def compile_anew() -> None:
    """A program that the process has forgotten."""
    assert float(jax.jit(lambda x: x * 3 + 1).lower(np.float32(0)).compile()(np.float32(2))) == 7


def compile_kept() -> None:
    with compilation_cache.kept():
        compile_anew()


def entry(folder: Path) -> Path:
    (found,) = folder.glob("*-cache")
    return found


def test_a_program_is_compiled_once(folder: Path, events: list[str]) -> None:
    compile_kept()
    compile_kept()
    assert events == [MISS, HIT]


class GatedLock:
    """JAX's lock, which tells when somebody waits for it."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self.wanted = threading.Event()

    def __enter__(self) -> None:
        self.wanted.set()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_thread_that_opens_the_cache_meanwhile_leaves_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's thread compiles while an engine's start or end resets the cache."""
    from jax._src import compilation_cache as of_jax

    lock = threading.Lock()
    gate = GatedLock(lock)
    monkeypatch.setattr(of_jax, "_cache_initialized_mutex", gate)
    with lock:  # as a thread that opens it holds it
        ours = threading.Thread(target=compilation_cache._reset)
        ours.start()
        assert gate.wanted.wait(60)
        monkeypatch.setattr(of_jax, "_cache", object())
        monkeypatch.setattr(of_jax, "_cache_initialized", True)
    ours.join()
    assert of_jax._cache is None
    assert not of_jax._cache_initialized
    compile_kept()


def test_jax_takes_our_cache_in_place_of_its_own(folder: Path) -> None:
    """By names that are not public: a newer jax without them is found here, where an engine does without."""
    from jax._src import compilation_cache as of_jax

    with compilation_cache.kept():
        assert isinstance(of_jax._cache, compilation_cache._WholeEntries)
    assert of_jax._cache is None


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda whole: b"",
    "cut short": lambda whole: whole[: len(whole) // 2],
    "without its last byte": lambda whole: whole[:-1],
    "garbage": lambda whole: os.urandom(len(whole)),
    "a changed bit": lambda whole: whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_entry_that_cannot_be_read_is_replaced(damage: str, folder: Path, events: list[str]) -> None:
    compile_kept()
    entry(folder).write_bytes(DAMAGES[damage](entry(folder).read_bytes()))
    compile_kept()
    compile_kept()
    assert events == [MISS, MISS, HIT]


def test_what_is_whole_but_no_program_is_replaced(folder: Path, events: list[str]) -> None:
    compile_kept()
    entry(folder).write_bytes(zlib.compress(b"a compile time, and then no executable"))
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        compile_kept()
    compile_kept()
    assert events == [MISS, MISS, HIT]


def test_a_full_disk_leaves_nothing_and_one_warning(
    folder: Path, events: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING, "trtllm_jax"), monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", half)
        with compilation_cache.kept():
            compile_anew()
            jax.jit(lambda x: x * 5 - 1).lower(np.float32(0)).compile()
    assert list(folder.iterdir()) == []
    (told,) = caplog.records
    assert f"{folder}" in told.getMessage()
    assert "No space left" in told.getMessage()
    events.clear()
    compile_kept()
    compile_kept()
    assert events == [MISS, HIT]


def test_without_a_folder_there_is_a_warning(folder: Path, events: list[str], caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.touch()
    with caplog.at_level(logging.WARNING, "trtllm_jax"):
        compile_kept()
    assert events == []
    assert "XDG_CACHE_HOME" in caplog.text


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    folder.mkdir(parents=True)
    old, new = folder / ".a.1.2.tmp", folder / ".b.1.2.tmp"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    compile_kept()
    assert not old.exists()
    assert new.exists()


class TestOurProgramsAlone:
    def test_a_users_programs_are_not_kept(self, folder: Path, events: list[str]) -> None:
        before = [getattr(jax.config, name) for name in NAMES]
        compile_kept()
        assert [getattr(jax.config, name) for name in NAMES] == before
        events.clear()
        compile_anew()
        assert events == []
        with pytest.raises(ZeroDivisionError), compilation_cache.kept():
            raise ZeroDivisionError
        assert [getattr(jax.config, name) for name in NAMES] == before

    @pytest.mark.slow
    def test_an_llm_changes_no_configuration(self, folder: Path, tiny_llama: Path) -> None:
        before = [getattr(jax.config, name) for name in NAMES]
        with LLM(tiny_llama, max_batch_size=1, max_num_tokens=16, max_seq_len=32) as llm:
            llm.warm_up()
            assert [getattr(jax.config, name) for name in NAMES] == before
            assert len(list(folder.glob("*-cache"))) > 5

    def test_a_users_folder_is_used_by_its_own_rules(self, folder: Path, events: list[str], tmp_path: Path) -> None:
        own = tmp_path / "own"
        jax.config.update("jax_compilation_cache_dir", str(own))
        reset_cache()
        compile_kept()  # in less than a second, which by JAX's rule is not worth keeping
        assert events == []
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compile_kept()
        entry(own).write_bytes(b"")
        compile_kept()
        compile_anew()
        assert events == [MISS, MISS, HIT]
        assert not folder.exists()
        assert jax.config.jax_compilation_cache_dir == str(own)

    def test_threads_share_it_until_the_last_has_ended(self, folder: Path) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            with compilation_cache.kept():
                begun.set()
                go_on.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        assert begun.wait(60)
        compile_kept()
        assert jax.config.jax_compilation_cache_dir == str(folder)
        go_on.set()
        thread.join(60)
        assert jax.config.jax_compilation_cache_dir is None

    def test_what_the_user_sets_meanwhile_stays(self, tmp_path: Path) -> None:
        with compilation_cache.kept():
            jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
