"""The rules that choose tile sizes, against what was measured on an H200, and against what the kernels can compute."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.devices import Platform
from pallas_kernels.matmul import Config, Wide, mosaic_hopper, pallas_triton, rules, tuned

H200 = Platform("gpu", "NVIDIA H200", 132)
SHARED_BYTES = 227 * 1024


class Product(NamedTuple):
    """A product of `rows` rows with a weight [n, k], or two."""

    n: int
    k: int
    gated: bool
    rows: int

    @property
    def choice(self) -> Config | Wide | None:
        return tuned.choose(H200, self.rows, self.n, self.k, self.gated)


def as_config(text: str) -> Config | Wide | None:
    name, *fields = text.split()
    sizes = list(map(int, fields))
    if name == "XLA":
        return None
    return Wide(*sizes) if name == "Wide" else Config(*sizes[:6], bool(sizes[6]))


def without_norm(config: Config | Wide | None) -> Config | Wide | None:
    """The sweep had no norms: whether the kernel would compute one made no difference."""
    return config._replace(normalises=False) if isinstance(config, Config) else config


def measured() -> dict[Product, dict[Config | Wide | None, float]]:
    """Microseconds of the configurations in the sweep, by `benchmarks/matmul.py`."""
    found: dict[Product, dict[Config | Wide | None, float]] = defaultdict(dict)
    with Path(__file__).with_name("products_h200.csv").open() as file:
        for row in csv.DictReader(file):
            product = Product(int(row["n"]), int(row["k"]), row["gated"] == "1", int(row["rows"]))
            found[product][without_norm(as_config(row["config"]))] = float(row["us"])
    return found


MEASURED = measured()
KNOWN = [product for product, times in MEASURED.items() if without_norm(product.choice) in times]
"""Products of the sweep whose choice was in it."""


@pytest.mark.parametrize("product", KNOWN, ids=str)
def test_a_choice_is_within_a_tenth_of_the_fastest(product: Product) -> None:
    times = MEASURED[product]
    assert times[without_norm(product.choice)] <= 1.1 * min(times.values())


def test_nearly_all_choices_were_measured_and_are_together_faster_than_xla() -> None:
    assert len(KNOWN) >= 0.9 * len(MEASURED)
    by_kernels = [product for product in KNOWN if product.choice is not None]
    chosen = sum(MEASURED[product][without_norm(product.choice)] for product in by_kernels)
    assert chosen < 0.94 * sum(MEASURED[product][None] for product in by_kernels)


@given(
    rows=st.integers(1, 400), n=st.integers(1, 300).map(lambda i: 64 * i), k=st.integers(1, 160).map(lambda i: 128 * i),
    gated=st.booleans(), multiprocessors=st.integers(60, 200),
)  # fmt: skip
def test_choices_are_products_that_the_kernels_compute(
    rows: int, n: int, k: int, gated: bool, multiprocessors: int
) -> None:
    choice = rules.choose(multiprocessors, rows, n, k, gated)
    if choice is None:
        return
    assert choice.takes(rows, n, k)
    planes = 2 if gated else 1
    if isinstance(choice, Wide):
        shared = 2 * choice.slots * 64 * (128 + planes * choice.tile_n)
        programs = n // choice.tile_n
    else:
        shared = 2 * choice.num_stages * choice.block_k * (planes * choice.block_n + choice.block_m)
        shared *= choice.tensor_cores
        programs = math.ceil(rows / choice.block_m) * math.ceil(n / choice.block_n) * choice.splits
        assert choice.splits == 1 or programs <= multiprocessors
        assert k // choice.block_k // choice.splits >= choice.num_stages
    assert shared <= SHARED_BYTES
    if rows > 1:
        assert rules.busy(multiprocessors, programs) >= (0.8 if gated else 0.7)
        assert programs <= 2 * multiprocessors


@pytest.mark.parametrize("rows", [1, 8, 32, 128])
def test_the_many_programs_of_a_head_are_left_to_xla(rows: int) -> None:
    """XLA's product of 8B's head reads 98 to 106 % of what a copy does."""
    assert Product(128256, 4096, False, rows).choice is None


@pytest.mark.parametrize(
    "platform",
    [Platform("gpu", "NVIDIA H200"), Platform("gpu", "NVIDIA A100-SXM4-80GB", 108), Platform("cpu")],
    ids=["unknown size", "Ampere", "CPU"],
)
def test_the_rules_are_for_hopper_whose_size_is_known(platform: Platform) -> None:
    assert tuned.choose(platform, 32, 4096, 4096, False) is None


def test_what_was_measured_goes_before_the_rules() -> None:
    h100 = Platform("gpu", "NVIDIA H100 80GB HBM3", 132)
    assert tuned.choose(h100, 32, 6144, 4096, False) == tuned.MEASURED["H100"][6144, 4096, False][32]
    assert tuned.choose(h100, 32, 8192, 3840, False) == tuned.choose(H200, 32, 8192, 3840, False) is not None


LOWERED = [
    Product(6144, 4096, False, 1), Product(8192, 3840, False, 1), Product(3072, 2048, False, 8),
    Product(8192, 2048, True, 32), Product(5120, 17408, False, 32), Product(4096, 14336, False, 128),
    Product(15360, 3840, True, 128),
]  # fmt: skip


@pytest.mark.parametrize("product", LOWERED, ids=str)
def test_choices_lower_for_hopper(product: Product) -> None:
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    config, planes = product.choice, 2 if product.gated else 1
    x = jax.ShapeDtypeStruct((product.rows, product.k), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((planes, product.n, product.k), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        if isinstance(config, Wide):
            run = jax.jit(partial(mosaic_hopper.product, residual=None, config=config))
        else:
            assert config is not None
            run = jax.jit(partial(pallas_triton.product, residual=None, norm=None, config=config))
        text = run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" if isinstance(config, Wide) else "__gpu$xla.gpu.triton") in text
