"""The platform that a program runs on, by which operations choose their implementations."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

HOPPER = ("H100", "H200", "H800", "H20", "GH200")


@dataclass(frozen=True)
class Platform:
    """The backend that a program is compiled for; hashable, so that it can be a static argument of jit.

    Attributes:
        kind: JAX's name of the backend, "cpu" or "gpu".
        gpu: the name of the GPU; empty for a CPU.
        multiprocessors: how many the GPU has; 0 for a CPU, or if unknown.
    """

    kind: str
    gpu: str = ""
    multiprocessors: int = 0

    @classmethod
    def of(cls, mesh: Mesh) -> "Platform":
        """The platform of a mesh's devices, which are all of one kind."""
        return cls.of_device(mesh.devices.flat[0])

    @classmethod
    def of_device(cls, device: jax.Device) -> "Platform":
        """The platform of a device."""
        if device.platform != "gpu":
            return cls(device.platform)
        return cls("gpu", device.device_kind, int(getattr(device, "core_count", None) or 0))

    @classmethod
    def default(cls) -> "Platform":
        """The platform of JAX's default backend; nothing else asks JAX for it."""
        return cls.of_device(jax.devices()[0])

    @property
    def on_cpu(self) -> bool:
        """Whether the platform is a CPU."""
        return self.kind == "cpu"

    @property
    def on_gpu(self) -> bool:
        """Whether the platform is a GPU."""
        return self.kind == "gpu"

    @property
    def is_hopper(self) -> bool:
        """Whether it is a Hopper GPU (compute capability 9.0), with its tensor core instructions and bulk copies."""
        return any(name in self.gpu for name in HOPPER)
