"""Many small host arrays as one int32 vector, because each array passed to a compiled step costs its own transfer."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class Field:
    """One array of a packed vector: its name, shape, and a 32-bit dtype or bool."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic] = np.int32


@dataclass(frozen=True)
class Layout:
    """The fields of a packed vector, in order."""

    fields: tuple[Field, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """The fields' names."""
        return frozenset(field.name for field in self.fields)

    @cached_property
    def size(self) -> int:
        """Length of the vector."""
        return sum(prod(field.shape) for field in self.fields)

    def pack(self, **arrays: np.ndarray) -> np.ndarray:
        """The vector of these arrays; an array shorter than its field along any axis is padded with zeros."""
        packed = np.zeros(self.size, np.int32)
        offset = 0
        for field in self.fields:
            array = np.asarray(arrays.pop(field.name), np.int32 if field.dtype is np.bool_ else field.dtype)
            size = prod(field.shape)
            into = packed[offset : offset + size].view(array.dtype).reshape(field.shape)
            into[tuple(slice(extent) for extent in array.shape)] = array
            offset += size
        if arrays:
            raise TypeError(f"no such fields: {', '.join(arrays)}")
        return packed

    def unpack(self, packed: jax.Array) -> dict[str, jax.Array]:
        """The arrays by name, inside a compiled function."""
        arrays = {}
        offset = 0
        for field in self.fields:
            size = prod(field.shape)
            bits = packed[offset : offset + size].reshape(field.shape)
            if field.dtype is np.bool_:
                arrays[field.name] = bits != 0
            elif field.dtype is np.int32:
                arrays[field.name] = bits
            else:
                arrays[field.name] = lax.bitcast_convert_type(bits, jnp.dtype(field.dtype))
            offset += size
        return arrays
