from __future__ import annotations

import click
import pytest

from sharding import DeviceCountError, make_mesh
from trtllm_jax.commands.user_errors import readable_errors


@pytest.mark.parametrize("error", [ValueError("wrong"), MemoryError("wrong"), DeviceCountError("wrong")])
def test_what_a_user_can_fix_is_one_line(error: Exception) -> None:
    with pytest.raises(click.ClickException, match="wrong"), readable_errors():
        raise error


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="ours"), readable_errors():
        raise RuntimeError("ours")


def test_too_few_devices_are_what_a_user_can_fix() -> None:
    with pytest.raises(click.ClickException, match="use tensor_parallel_size=8 or less"), readable_errors():
        make_mesh(1000)
