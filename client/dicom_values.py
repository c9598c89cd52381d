"""Stored DICOM values as arrays: unused bits, ranges, padding, colours that mean grey. No file is opened here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from unimiss_core.errors import ScanError


def grey_of(colour: NDArray[Any]) -> NDArray[Any]:
    """(H, W, 3) whose channels agree -> (H, W). Raises ScanError(colour_image) where they do not.

    A grey picture that went through a colour JPEG differs by a few levels: 2% of the range on average is allowed.
    """
    wide = colour[..., :3].astype(np.float64)
    spread = float((wide.max(axis=2) - wide.min(axis=2)).mean())
    span = float(np.iinfo(colour.dtype).max) if colour.dtype.kind in "ui" else float(np.ptp(wide) or 1.0)
    if spread > 0.02 * span:
        raise ScanError("colour_image")
    return np.asarray(wide.mean(axis=2))


def without_unused_bits(stored: NDArray[Any], *, bits: int, high_bit: int) -> NDArray[Any]:
    """Integers cut to their `bits`, the sign kept: old files have overlays in the rest of the word."""
    allocated = stored.dtype.itemsize * 8
    if stored.dtype.kind not in "iu" or not 0 < bits < allocated:
        return stored
    shift = min(max(0, high_bit - (bits - 1)), allocated - bits)
    return np.asarray(stored << (allocated - bits - shift) >> (allocated - bits))


def bounds(stored: NDArray[Any], *, bits: int) -> tuple[float, float]:
    """Lowest and highest value that `bits` can store; those that are there where values are real numbers."""
    if stored.dtype.kind == "f":
        return float(stored.min()), float(stored.max())
    bits = bits or stored.dtype.itemsize * 8
    if stored.dtype.kind == "i":
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1


def as_stored(value: float, stored: NDArray[Any]) -> float:
    """A padding value as it stands among `stored` ones: a header may give it without sign where these have one, and the
    other way round, for both are the same bits."""
    if stored.dtype.kind not in "iu":
        return value
    kind = np.iinfo(stored.dtype)
    if value > kind.max:
        return value - 2.0**kind.bits
    return value + 2.0**kind.bits if value < kind.min else value


def between(stored: NDArray[Any], one: float, other: float) -> NDArray[np.bool_]:
    """Where values lie in [one, other], whichever is larger: the range in which a scanner wrote no picture."""
    return np.asarray((stored >= min(one, other)) & (stored <= max(one, other)))
