"""The output thread: an exception of one owner does not affect other owners."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trtllm_jax.engine.request import FinishReason, Update
from trtllm_jax.requests.output_processor import OutputThread, deliver


class Owner:
    def __init__(self, failing: int = 0) -> None:
        self.failing = failing
        self.taken: list[Update] = []

    def take(self, update: Update) -> None:
        self.taken.append(update)
        if self.failing:
            self.failing -= 1
            raise ValueError("cannot take updates")


def updates(*owners: Owner) -> list[Update]:
    requests: list[Any] = [SimpleNamespace(owner=owner) for owner in owners]
    return [Update(request, finish=FinishReason.STOP) for request in requests]


def test_an_exception_fails_its_owner_and_no_other() -> None:
    faulty, other = Owner(failing=1), Owner()
    deliver(updates(faulty, other))
    assert [type(update.error) for update in faulty.taken] == [type(None), ValueError]
    assert [update.finish for update in other.taken] == [FinishReason.STOP]


def test_an_owner_that_cannot_take_its_failure_delays_no_other(caplog: pytest.LogCaptureFixture) -> None:
    other = Owner()
    thread = OutputThread()
    thread.put(updates(Owner(failing=2)))
    thread.put(updates(other))
    thread.end()
    thread.join()
    assert len(other.taken) == 1
    assert "could not be delivered" in caplog.text
