"""The largest values of the dtypes of device arrays."""

INT32_MAX = 2**31 - 1
"""Token ids, positions and the sizes of arrays are int32."""

FLOAT32_MAX = 3.4e38
"""Rounded down, so that it is still finite after conversion to float32."""
