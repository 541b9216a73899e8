"""What reaches stderr: by level, by environment, and by whether somebody watches."""

import contextlib
import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from trtllm_jax import logger as module
from trtllm_jax.logger import configure, logger, progress, set_level, status


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def default_level() -> Iterator[None]:
    yield
    configure(None)


@contextlib.contextmanager
def root_handlers(*handlers: logging.Handler) -> Iterator[None]:
    """As in a program whose root logger has only these; pytest puts its own there while a test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", list(handlers))
        yield


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("INTERNAL_ERROR", logging.CRITICAL),
        ("error", logging.ERROR),
        ("Warning", logging.WARNING),
        (" info ", logging.INFO),
        ("VERBOSE", logging.DEBUG),
        ("debug", logging.DEBUG),
        ("trace", logging.DEBUG),
    ],
)
def test_level_names_in_any_case(name: str, level: int) -> None:
    configure(name)
    assert logger.level == level


def test_an_unknown_level_warns_and_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with root_handlers():
        configure("loud")
    assert logger.level == logging.WARNING
    error = capsys.readouterr().err
    assert "WARNING" in error
    assert "TRTLLM_LOG_LEVEL is ignored: log level = 'loud' is unknown: use one of INTERNAL_ERROR, ERROR," in error


def test_set_level_refuses_what_the_environment_only_warns_about() -> None:
    with pytest.raises(ValueError, match="log level = 'loud' is unknown: use one of"):
        set_level("loud")


def test_a_record_is_written_once_and_only_from_its_level_on(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO")
    configure("INFO")
    with root_handlers():
        logger.info("seen")
        logger.debug("unseen")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("[trtllm_jax] [INFO] seen\n") == 1
    assert "unseen" not in captured.err


def test_an_application_that_configures_logging_gets_the_records_alone(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    with root_handlers(handler):
        logger.warning("once")
    assert records == ["once"]
    assert capsys.readouterr().err == ""


def test_the_environment_decides_at_import() -> None:
    script = "from trtllm_jax.logger import logger; logger.debug('deep')"
    run = subprocess.run(
        [sys.executable, "-c", script], env={"TRTLLM_LOG_LEVEL": "DEBUG"}, capture_output=True, text=True, check=True
    )
    assert run.stderr.endswith("[trtllm_jax] [DEBUG] deep\n")


def test_status_is_silent_in_a_pipe_and_plain_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, terminal = io.StringIO(), _Terminal()
    monkeypatch.setattr(sys, "stderr", pipe)
    status("started")
    monkeypatch.setattr(sys, "stderr", terminal)
    status("started")
    assert (pipe.getvalue(), terminal.getvalue()) == ("", "started\n")


def test_status_is_one_record_at_info_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    set_level("INFO")
    with root_handlers():
        status("started")
    assert terminal.getvalue().count("started") == 1
    assert "[INFO] started" in terminal.getvalue()


@pytest.mark.parametrize(("stream", "shown"), [(_Terminal, True), (io.StringIO, False)])
def test_progress_is_for_terminals(stream: type[io.StringIO], shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress(total=4, desc="loading", unit="B", unit_scale=True) as bar:
        bar.update(2)
        bar.update(2)
    bar.close()
    assert ("loading: 100%" in stderr.getvalue()) == shown
    assert bool(stderr.getvalue()) == shown


def test_progress_without_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = _Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    bar = progress(total=None, desc="requests")
    bar.update(3)
    bar.close()
    assert "requests: 3it" in stderr.getvalue()


def test_importing_the_logger_does_not_import_tqdm() -> None:
    script = f"import sys, {module.__name__}; assert 'tqdm' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
