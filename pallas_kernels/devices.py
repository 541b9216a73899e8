"""What computes: what the operations choose their implementations by."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

HOPPER = ("H100", "H200", "H800", "H20", "GH200")


@dataclass(frozen=True)
class Platform:
    """The backend that a program is compiled for; hashable, so that it may be static in jit.

    Attributes:
        kind: "cpu" or "gpu", as JAX calls it.
        gpu: the name of the GPU; empty where none computes.
    """

    kind: str
    gpu: str = ""

    @classmethod
    def of(cls, mesh: Mesh) -> "Platform":
        """That of a mesh's devices, which are all of a kind."""
        return cls.of_device(mesh.devices.flat[0])

    @classmethod
    def of_device(cls, device: jax.Device) -> "Platform":
        """That of a device."""
        return cls(device.platform, device.device_kind if device.platform == "gpu" else "")

    @classmethod
    def default(cls) -> "Platform":
        """That of JAX's default backend, which only this function asks for."""
        return cls.of_device(jax.devices()[0])

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU computes."""
        return self.kind == "cpu"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return self.kind == "gpu"

    @property
    def is_hopper(self) -> bool:
        """Whether a GPU does that has Hopper's tensor cores and copies (compute capability 9.0)."""
        return any(name in self.gpu for name in HOPPER)
