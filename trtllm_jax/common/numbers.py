"""The largest numbers that arrays on a device hold."""

INT32_MAX = 2**31 - 1
"""Token ids, positions and the sizes of arrays are int32."""

FLOAT32_MAX = 3.4e38
"""Rounded down, so that what equals it is finite in float32 too."""
