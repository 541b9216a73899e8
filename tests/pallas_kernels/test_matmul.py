"""Products with large weights against float64, for XLA and for the kernel: interpreted, or compiled on a GPU."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.devices import Platform
from pallas_kernels.matmul import (
    ACTIVATIONS,
    Activation,
    Config,
    Wide,
    adds_residual,
    gated_linear,
    linear,
    mosaic_hopper,
    pallas_triton,
    tuned,
)
from pallas_kernels.norm import Norm
from pallas_kernels.weights import QuantizedWeight, quantize_int8

EPS = 0.1
ONE_WAVE = Config(block_n=32, block_m=16, block_k=64, splits=1, num_warps=4, num_stages=3)
SPLIT = Config(block_n=16, block_m=32, block_k=32, splits=3, num_warps=4, num_stages=3)
BY_ROW = Config(block_n=8, block_m=2, block_k=64, splits=1, num_warps=4, num_stages=1)
BY_ROW_SPLIT = Config(block_n=16, block_m=1, block_k=64, splits=2, num_warps=4, num_stages=1)
ALL_ROWS = Config(block_n=64, block_m=128, block_k=64, splits=2, num_warps=8, num_stages=3)

CASES: list[tuple[int, Any]] = [
    *[(m, "xla") for m in (1, 3)],
    *[(m, ONE_WAVE) for m in (1, 17)],
    *[(m, SPLIT) for m in (3, 64)],
    *[(m, BY_ROW) for m in (1, 3)],
    (1, BY_ROW_SPLIT),
    (130, ALL_ROWS),
]
KERNELS = [ONE_WAVE, SPLIT, BY_ROW, BY_ROW_SPLIT, ALL_ROWS]
ALSO_ON_A_GPU = [*CASES, *[pytest.param(*case, marks=pytest.mark.gpu) for case in CASES if case[1] != "xla"]]


class Numbers:
    """Random operands, once as the functions take them and once as float64."""

    def __init__(self, m: int, n: int, k: int, dtype: Any) -> None:
        rng = np.random.default_rng([m, n, k])

        def draw(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), dtype)

        self.x, self.w, self.residual = draw(m, k), draw(2, n, k) / k**0.5, draw(m, n)
        self.gamma = 1 + draw(k) / 2

    def product(self, plane: int, normed: bool) -> np.ndarray:
        x, w = np.asarray(self.x, np.float64), np.asarray(self.w[plane], np.float64)
        if normed:
            x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPS) * np.asarray(self.gamma, np.float64)
        return x @ w.T


def relative_error(got: jax.Array, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("m", "implementation"), ALSO_ON_A_GPU)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.slow
def test_linear_adds_the_residual_to_the_product(m: int, implementation: Any, normed: bool) -> None:
    """80 outputs are no multiple of any tile, and 320 inputs are 5 or 10 blocks, no multiple of the splits."""
    numbers = Numbers(m, 80, 320, jnp.float16)
    norm = Norm(numbers.gamma, EPS) if normed else None
    run = jax.jit(partial(linear, norm=norm, implementation=implementation))
    added = run(numbers.x, numbers.w[0], residual=numbers.residual)
    assert added.dtype == jnp.float16
    expected = numbers.product(0, normed) + np.asarray(numbers.residual, np.float64)
    assert relative_error(added, expected) < 6e-4


@pytest.mark.parametrize(("m", "implementation"), ALSO_ON_A_GPU)
def test_rows_that_are_no_numbers_change_no_other_row(m: int, implementation: Any) -> None:
    numbers = Numbers(m, 80, 320, jnp.float16)
    run = jax.jit(partial(gated_linear, norm=Norm(numbers.gamma, EPS), implementation=implementation))
    whole = np.arange(m) % 3 != 1
    got = run(jnp.where(whole[:, None], numbers.x, jnp.nan), numbers.w)
    np.testing.assert_array_equal(got[whole], run(numbers.x, numbers.w)[whole])


@pytest.mark.parametrize(("m", "implementation"), ALSO_ON_A_GPU)
def test_a_gated_product_of_normalised_rows(m: int, implementation: Any) -> None:
    numbers = Numbers(m, 80, 320, jnp.float16)
    run = jax.jit(partial(gated_linear, norm=Norm(numbers.gamma, EPS), implementation=implementation))
    got = run(numbers.x, numbers.w)
    gate, up = numbers.product(0, True), numbers.product(1, True)
    assert relative_error(got, gate / (1 + np.exp(-gate)) * up) < 1e-3


@pytest.mark.parametrize(("m", "implementation"), [(1, "xla"), (3, ONE_WAVE), (3, BY_ROW)])
def test_the_weights_of_a_norm_may_be_stored_less_one(m: int, implementation: Any) -> None:
    """In bfloat16 it is the kernel that normalises; in float16 what comes before it."""
    for dtype in (jnp.float16, jnp.bfloat16):
        numbers = Numbers(m, 80, 320, dtype)
        less = Norm((numbers.gamma.astype(jnp.float32) - 1).astype(dtype), EPS, offset=1.0)
        got = linear(numbers.x, numbers.w[0], norm=less, implementation=implementation)
        assert relative_error(got, numbers.product(0, True)) < (1e-3 if dtype == jnp.float16 else 8e-3)


@pytest.mark.parametrize("implementation", ["xla", ONE_WAVE])
def test_a_norm_that_the_kernel_does_not_make_comes_before_it(implementation: Any) -> None:
    numbers = Numbers(3, 80, 320, jnp.bfloat16)
    norm = Norm(numbers.gamma, EPS, bias=numbers.x[0], kind="layer")
    got = linear(numbers.x, numbers.w[0], norm=norm, implementation=implementation)
    x, gamma, bias = (np.asarray(array, np.float64) for array in (numbers.x, numbers.gamma, numbers.x[0]))
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + EPS) * gamma + bias
    assert relative_error(got, x @ np.asarray(numbers.w[0], np.float64).T) < 8e-3


GATES = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x) ** 2,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_are_those_of_torch(activation: Activation) -> None:
    numbers = Numbers(5, 80, 320, jnp.float32)
    gate, up = (torch.from_numpy(numbers.product(plane, False)) for plane in range(2))
    got = gated_linear(numbers.x, numbers.w, activation=activation)
    assert relative_error(got, (GATES[activation](gate) * up).numpy()) < 1e-5


def test_the_kernels_gate_by_silu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers(16, 80, 320, jnp.bfloat16)
    with pytest.raises(ValueError, match="does not take"):
        gated_linear(numbers.x, numbers.w, activation="relu", implementation=ONE_WAVE)
    monkeypatch.setattr(tuned, "choose", lambda *_: ONE_WAVE)
    text = jax.jit(partial(gated_linear, activation="relu")).lower(numbers.x, numbers.w).as_text()
    assert "dot_general" in text, "XLA's, whatever was measured"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("m", [1, 5])
def test_products_with_int8_weights(m: int, dtype: Any) -> None:
    """Against float64 products with the weights that the record stands for."""
    numbers = Numbers(m, 80, 320, dtype)
    quantized = quantize_int8(numbers.w)
    planes = np.asarray(quantized.values, np.float64) * np.asarray(quantized.scales, np.float64)[..., None]
    x, gamma = (np.asarray(array, np.float64) for array in (numbers.x, numbers.gamma))
    tolerance = 1e-6 if dtype == jnp.float32 else 4e-3
    first = QuantizedWeight(quantized.values[0], quantized.scales[0])
    added = linear(numbers.x, first, residual=numbers.residual)
    assert added.dtype == dtype
    assert relative_error(added, x @ planes[0].T + np.asarray(numbers.residual, np.float64)) < tolerance
    normed = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPS) * gamma
    gate, up = normed @ planes[0].T, normed @ planes[1].T
    gated = gated_linear(numbers.x, quantized, norm=Norm(numbers.gamma, EPS))
    assert relative_error(gated, gate / (1 + np.exp(-gate)) * up) < 3 * tolerance


def test_no_kernel_takes_a_quantised_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers(16, 80, 320, jnp.bfloat16)
    monkeypatch.setattr(tuned, "choose", lambda *_: ONE_WAVE)
    gpu = Platform("gpu")
    assert adds_residual(numbers.x, numbers.w[0], gpu)
    assert not adds_residual(numbers.x, quantize_int8(numbers.w[0]), gpu)
    with pytest.raises(ValueError, match="does not take"):
        linear(numbers.x, quantize_int8(numbers.w[0]), implementation=ONE_WAVE)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("m", [1, 3, 130])
def test_compiled_tiles_stay_inside_the_result(implementation: Config, m: int) -> None:
    """The interpreter drops what is written beyond an array; compiled, it would land in the next row."""
    numbers = Numbers(m, 80, 320, jnp.bfloat16)
    norm = Norm(numbers.gamma, EPS)
    added = linear(numbers.x, numbers.w[0], residual=numbers.residual, norm=norm, implementation=implementation)
    gate, up = numbers.product(0, True), numbers.product(1, True)
    assert relative_error(added, gate + np.asarray(numbers.residual, np.float64)) < 8e-3
    gated = gated_linear(numbers.x, numbers.w, norm=norm, implementation=implementation)
    assert relative_error(gated, gate / (1 + np.exp(-gate)) * up) < 8e-3


@pytest.mark.parametrize(
    "implementation",
    ["xla", ONE_WAVE, SPLIT, BY_ROW, *[pytest.param(config, marks=pytest.mark.gpu) for config in KERNELS]],
)
def test_a_bfloat16_product_is_rounded_once(implementation: Any) -> None:
    """Rounding the result to 8 bits costs 0.17 percent in the root mean square; rounding the sums would cost more."""
    numbers = Numbers(5, 64, 320, jnp.bfloat16)
    got = jax.jit(partial(linear, implementation=implementation))(numbers.x, numbers.w[1])
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, numbers.product(1, False)) < 2.2e-3


def test_activations_wider_than_the_weights_keep_their_dtype() -> None:
    numbers = Numbers(1, 64, 320, jnp.bfloat16)
    got = linear(numbers.x.astype(jnp.float32), numbers.w[0])
    assert got.dtype == jnp.float32
    assert relative_error(got, numbers.product(0, False)) < 1e-5


def test_shapes_that_do_not_fit_are_named() -> None:
    """By the functions themselves: the checks of annotations, which only tests have, come before."""
    bare, bare_gated = inspect.unwrap(linear), inspect.unwrap(gated_linear)
    numbers = Numbers(3, 64, 320, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"x \(3, 64\) times w \(64, 320\)"):
        bare(numbers.x[:, :64], numbers.w[0])
    with pytest.raises(ValueError, match=r"plus residual \(2, 64\)"):
        bare(numbers.x, numbers.w[0], residual=numbers.residual[:2])
    with pytest.raises(ValueError, match=r"want x \[m, k\] and w \[2, n, k\]"):
        bare_gated(numbers.x, numbers.w[:1])
    with pytest.raises(ValueError, match="does not take"):
        linear(numbers.x, numbers.w[0], implementation=ONE_WAVE._replace(block_k=256))
    with pytest.raises(ValueError, match="does not take"):
        linear(numbers.x.astype(jnp.float32), numbers.w[0], implementation=ONE_WAVE)


def test_the_table_answers_for_the_next_larger_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "MEASURED", {"H100": {(6144, 4096, False): {16: ONE_WAVE, 64: None, 128: SPLIT}}})

    def choose(
        m: int, device: str = "NVIDIA H100 80GB HBM3", n: int = 6144, gated: bool = False
    ) -> Config | Wide | None:
        return tuned.choose(Platform("gpu", device), m, n, 4096, gated)

    assert [choose(m) for m in (1, 16, 17, 64, 65, 129)] == [ONE_WAVE, ONE_WAVE, None, None, SPLIT, None]
    assert choose(1, device="NVIDIA A100-SXM4-80GB") is None
    assert choose(1, n=6160) is None
    assert choose(1, gated=True) is None


def test_measured_configurations_take_their_shapes() -> None:
    for shapes in tuned.MEASURED.values():
        for (n, k, _), rows in shapes.items():
            assert all(config is None or config.takes(most, n, k) for most, config in rows.items())


WIDE = [(128, Wide(112, 1)), (192, Wide(112, 2)), (304, Wide(128, 2)), (1100, Wide(64, 2, band=2, slots=6))]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "config"), WIDE)
def test_many_rows_by_the_kernel_for_hopper(m: int, config: Wide) -> None:
    """896 outputs are whole tiles of each width; rows are no multiple of what a cluster takes, and some tiles many."""
    m -= m % 8
    numbers = Numbers(m, 896, 512, jnp.bfloat16)
    gate, up = numbers.product(0, False), numbers.product(1, False)
    gated = gated_linear(numbers.x, numbers.w, implementation=config)
    assert relative_error(gated, gate / (1 + np.exp(-gate)) * up) < 4e-3
    assert relative_error(linear(numbers.x, numbers.w[0], implementation=config), gate) < 2.2e-3
    added = linear(numbers.x, numbers.w[0], residual=numbers.residual, implementation=config)
    assert relative_error(added, gate + np.asarray(numbers.residual, np.float64)) < 2.2e-3


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="this jax has no interpreter for Mosaic GPU")
@pytest.mark.parametrize(
    ("m", "n", "planes", "config"),
    [
        (648, 512, 1, Wide(256, 2, band=2)),
        (256, 256, 1, Wide(256, 2)),
        (192, 224, 2, Wide(112, 2)),
        (136, 224, 2, Wide(112, 1)),
        (520, 256, 2, Wide(128, 2, band=2)),
    ],
)
def test_the_kernel_for_hopper_interpreted(
    m: int, n: int, planes: int, config: Wide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clusters or four programs walk over all tiles; the interpreter looks for races of copies and products too."""
    monkeypatch.setattr(mosaic_hopper, "MULTIPROCESSORS", 4)
    numbers = Numbers(m, n, 320, jnp.bfloat16)
    careful = plgpu.InterpretGPUParams(
        detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
    )
    residual = numbers.residual if planes == 1 else None
    got = mosaic_hopper.product(numbers.x, numbers.w[:planes], residual, config, interpret=careful)
    gate, up = numbers.product(0, False), numbers.product(1, False)
    expected = gate + np.asarray(numbers.residual, np.float64) if planes == 1 else gate / (1 + np.exp(-gate)) * up
    assert relative_error(got, expected) < 2.5e-3


@pytest.mark.parametrize(
    ("m", "n", "k"), [(120, 896, 512), (132, 896, 512), (128, 896, 512), (256, 900, 512), (256, 896, 500)]
)
def test_the_kernel_for_hopper_refuses_what_it_cannot_divide(m: int, n: int, k: int) -> None:
    numbers = Numbers(m, n, k, jnp.bfloat16)
    with pytest.raises(ValueError, match="does not take"):
        linear(numbers.x, numbers.w[0], implementation=Wide(112, 2))


def test_the_kernel_for_hopper_writes_sixteen_outputs_at_least() -> None:
    assert Wide(112, 1).takes(128, 896, 512)
    assert not Wide(56, 1).takes(128, 896, 512)


LLAMA_8B = {"qkv": (1, 6144, 4096), "gate_up": (2, 14336, 4096), "down": (1, 4096, 14336), "head": (1, 128256, 4096)}
LOWERED = [
    (1, Config(8, 1, 512, 1, 4, 1)),
    (3, Config(4, 4, 1024, 1, 8, 1)),
    (1, Config(16, 16, 512, 1, 4, 4)),
    (16, Config(64, 16, 256, 3, 4, 4)),
    (100, Config(64, 128, 64, 2, 8, 4)),
    (256, Config(64, 256, 64, 1, 8, 3)),
]


HOPPER = AbstractMesh(
    (1,), ("x",), axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132),
)  # fmt: skip


@pytest.mark.parametrize("name", ["qkv", "gate_up", "down"])
@pytest.mark.parametrize(("m", "config"), [(128, Wide(64, 1, slots=6)), (192, Wide(64, 2)), (8192, Wide(128, 2))])
def test_the_kernel_for_many_rows_lowers_for_hopper(name: str, m: int, config: Wide) -> None:
    """There is no interpreter for it: this is all that a CPU can say."""
    planes, n, k = LLAMA_8B[name]
    shapes = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in ((m, k), (planes, n, k), (m, n))]
    residual = shapes[2] if planes == 1 else None
    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = jax.jit(partial(mosaic_hopper.product, config=config)).trace(*shapes[:2], residual)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", LLAMA_8B)
@pytest.mark.parametrize(("m", "config"), LOWERED)
def test_the_kernel_lowers_for_hopper(name: str, m: int, config: Config) -> None:
    """Lowering refuses what the interpreter forgives, such as tiles that are no powers of two."""
    planes, n, k = LLAMA_8B[name]

    def run(x: jax.Array, w: jax.Array, gamma: jax.Array, residual: jax.Array) -> jax.Array:
        added = residual if planes == 1 else None
        return pallas_triton.product(x, w, added, Norm(gamma, EPS, offset=1.0), config)

    shapes = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in ((m, k), (planes, n, k), (k,), (m, n))]
    with jax.sharding.use_abstract_mesh(HOPPER):
        lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 1
