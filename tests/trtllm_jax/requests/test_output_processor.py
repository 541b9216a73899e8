"""The thread between the engine and the users: one owner's fault is nobody else's."""

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
            raise ValueError("cannot be told")


def updates(*owners: Owner) -> list[Update]:
    made: list[Any] = [SimpleNamespace(owner=owner) for owner in owners]
    return [Update(request, finish=FinishReason.STOP) for request in made]


def test_a_fault_is_told_to_its_owner_and_the_others_go_on() -> None:
    faulty, other = Owner(failing=1), Owner()
    deliver(updates(faulty, other))
    assert [type(update.error) for update in faulty.taken] == [type(None), ValueError]
    assert [update.finish for update in other.taken] == [FinishReason.STOP]


def test_an_owner_that_cannot_be_told_even_that_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    other = Owner()
    thread = OutputThread()
    thread.put(updates(Owner(failing=2)))
    thread.put(updates(other))
    thread.end()
    thread.join()
    assert len(other.taken) == 1
    assert "could not be told" in caplog.text
