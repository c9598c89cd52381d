"""The loops over every value of a round's updates, compiled: each value is read once, by one thread.

torch goes through memory once for each operation, and its int64 arithmetic is slow; a round with many sites is nothing
but such passes. The other processor is left to the digests (`unimiss_core.wire.content_digest`).

Floats come as their bits, because Numba knows no bfloat16: `_value` makes a float64 of them.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

MOST_AT_ONCE = 4
"""Summands of one pass."""

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}

_compiled: Any = partial(njit, nogil=True, cache=os.access(Path(__file__).parent, os.W_OK))
"""Kept beside this file, where that may be written: compiling takes some seconds, once for each process otherwise."""


def extent(values: Tensor) -> tuple[float, float]:
    """(sum of squares in float64; the largest magnitude, 0 of none) of a tensor of any float type. The first is nan or
    inf where a value is, and the second is of any content then."""
    bits = _bits(values)
    squares, largest = _extent(bits, np.iinfo(bits.dtype).max)
    return squares, _float(largest, bits)


def add_codes(codes: Tensor, summands: Sequence[Tensor], weights: Sequence[float], cutter: float, begun: bool) -> None:
    """codes <- codes + sum over the summands of the bits of (weight * value + cutter), in int64, which wraps.

    codes: (n,) int64; of any content where not `begun`, and then taken as 0. summands: each (n,), at most MOST_AT_ONCE,
    all of one float type.
    """
    parts = [_bits(summand) for summand in summands]
    filled = [*parts, *[parts[0]] * (MOST_AT_ONCE - len(parts))]
    factors = (*weights, *[0.0] * (MOST_AT_ONCE - len(parts)))
    _add_codes(codes.numpy(), begun, len(parts), *filled, factors, cutter)


def join_codes(codes: Tensor, surplus: int, grid: float, divisor: float, result: Tensor) -> None:
    """result <- (codes - surplus) * grid / divisor, rounded once for each operation. codes: (n,) int64. result: (n,)
    float32 or float64."""
    _join_codes(codes.numpy(), surplus, grid, divisor, result.numpy())


def _bits(values: Tensor) -> NDArray[Any]:
    """The values end to end, as whole numbers of their size."""
    flat = values.detach().reshape(-1)
    if flat.dtype not in _BITS:
        flat = flat.float()
    bits: NDArray[Any] = flat.view(_BITS[flat.dtype]).numpy()
    return bits


def _value(bits: Any) -> float:
    """A float's bits as a float64. Only compiled code calls it."""
    raise NotImplementedError


@overload(_value)
def _value_of_type(bits):  # type: ignore[no-untyped-def]  # Numba holds its signature against the results'
    if bits == types.int16:
        return lambda bits: np.float64(np.int32(np.int32(bits) << 16).view(np.float32))
    if bits == types.int32:
        return lambda bits: np.float64(np.int32(bits).view(np.float32))
    return lambda bits: np.int64(bits).view(np.float64)


def _float(bits: int, like: NDArray[Any]) -> float:
    """The float of these bits, as `like` holds them."""
    held = torch.from_numpy(np.array([bits], like.dtype))
    return held.view(next(dtype for dtype, found in _BITS.items() if found == held.dtype)).item()


@_compiled(fastmath={"reassoc"})  # type: ignore[untyped-decorator]  # else each square waits for the one before
def _extent(bits: Any, magnitude: int) -> tuple[float, int]:
    """magnitude: all bits but the sign. Of two floats the larger has the larger one, read as a whole number."""
    squares, largest = 0.0, bits.dtype.type(0)
    for i in range(len(bits)):
        value = _value(bits[i])
        squares += value * value
        largest = max(largest, bits.dtype.type(bits[i] & magnitude))
    return squares, largest


@_compiled  # type: ignore[untyped-decorator]
def _add_codes(codes: Any, begun: bool, many: int, a: Any, b: Any, c: Any, d: Any, weights: Any, cutter: float) -> None:
    for i in range(len(codes)):
        code = codes[i] if begun else 0
        code += np.float64(_value(a[i]) * weights[0] + cutter).view(np.int64)
        if many > 1:
            code += np.float64(_value(b[i]) * weights[1] + cutter).view(np.int64)
        if many > 2:
            code += np.float64(_value(c[i]) * weights[2] + cutter).view(np.int64)
        if many > 3:
            code += np.float64(_value(d[i]) * weights[3] + cutter).view(np.int64)
        codes[i] = code


@_compiled  # type: ignore[untyped-decorator]
def _join_codes(codes: Any, surplus: int, grid: float, divisor: float, result: Any) -> None:
    for i in range(len(codes)):
        result[i] = np.float64(codes[i] - surplus) * grid / divisor
