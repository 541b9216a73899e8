"""Tile sizes of the matmul kernels: a table of measured choices, and rules for the products that it lacks."""

from collections.abc import Mapping

from pallas_kernels.devices import Platform
from pallas_kernels.matmul import rules
from pallas_kernels.matmul.tiles import Config, Wide

MANY = 1 << 30
"""A number of rows that no product reaches."""

Rows = Mapping[int, Config | Wide | None]
"""Choices by the largest number of rows that each applies to; None stands for XLA."""

MEASURED: dict[str, dict[tuple[int, int, bool], Rows]] = {
    "H100": {
        (6144, 4096, False): {
            1: Config(16, 1, 512, 1, 4, 1),
            16: Config(64, 16, 256, 1, 4, 4),
            32: Config(64, 32, 256, 1, 4, 4),
            64: Config(64, 64, 256, 1, 4, 3, normalises=False),
            128: Config(128, 128, 64, 1, 4, 6, normalises=False),
            256: Config(128, 128, 64, 1, 4, 6, normalises=False),
            2048: None,
            MANY: Wide(tile_n=256, cluster=2),
        },
        (4096, 4096, False): {
            1: Config(16, 1, 1024, 1, 8, 1),
            16: Config(64, 16, 256, 1, 4, 4),
            32: Config(64, 32, 128, 1, 4, 6),
            64: Config(64, 64, 128, 1, 4, 6),
            128: Config(64, 64, 128, 1, 4, 4),
            256: Config(64, 128, 64, 1, 4, 6),
            2048: None,
            MANY: Wide(tile_n=256, cluster=2),
        },
        (14336, 4096, True): {
            1: Config(4, 1, 1024, 1, 4, 1),
            16: Config(128, 16, 128, 1, 8, 3, normalises=False),
            32: Config(128, 32, 128, 1, 8, 3),
            64: None,
            96: Config(64, 128, 128, 1, 4, 3, normalises=False),
            128: Wide(tile_n=112, cluster=1),
            512: Wide(tile_n=112, cluster=2),
            MANY: Wide(tile_n=128, cluster=2),
        },
        (4096, 14336, False): {
            16: Config(32, 16, 512, 1, 4, 4),
            32: Config(64, 32, 128, 1, 4, 6),
            64: Config(128, 64, 128, 3, 8, 4),
            128: Config(64, 128, 64, 2, 4, 6),
            2048: None,
            MANY: Wide(tile_n=256, cluster=2),
        },
    },
}
"""The fastest choices by a part of the device's name and by (n, k, gated); they go before the rules."""


def choose(platform: Platform, m: int, n: int, k: int, gated: bool) -> Config | Wide | None:
    """The tile sizes for m rows on a GPU; None for XLA."""
    for name, shapes in MEASURED.items():
        if name in platform.gpu and (rows := shapes.get((n, k, gated))) is not None:
            bucket = min((most for most in rows if most >= m), default=None)
            return None if bucket is None else rows[bucket]
    if platform.is_hopper and platform.multiprocessors:
        return rules.choose(platform.multiprocessors, m, n, k, gated)
    return None
