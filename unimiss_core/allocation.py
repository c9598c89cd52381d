"""Where the C library puts what a step on a CPU allocates.

The first step over scans of a size also makes what stays for ever: the kernels of each shape of product, half a
megabyte each. On one heap with that step's activations they end up scattered between them, and later activations, which
are larger than the gaps, make the heap grow: by 40 MB where this was measured (docs/performance.md). So in a first step
whatever is large gets pages of its own, which are given back when it is freed; kernels lie side by side, and what later
steps allocate comes and goes behind them.

Of glibc alone; any other C library is left as it is.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's settings (mallopt(3))."""

_LARGE_AT_FIRST, _LARGE_LATER = 256 << 10, 32 << 20
"""Bytes from which an allocation has pages of its own. The second is what glibc itself comes to, and its most."""


class MemoryOfSteps:
    """Which sizes of scans have been met."""

    def __init__(self) -> None:
        self._met: set[torch.Size] = set()

    @contextmanager
    def laid_out(self, scans: Tensor) -> Iterator[None]:
        """Around passes over `scans`: on a CPU the first of their size lay memory out for the others."""
        is_first = scans.device.type == "cpu" and scans.shape not in self._met
        with large_apart() if is_first else nullcontext():
            yield
        self._met.add(scans.shape)


@contextmanager
def large_apart() -> Iterator[None]:
    """Around a first step. For the whole process, and from then on glibc's settings are no longer adapted by itself."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _LARGE_AT_FIRST)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGE_LATER)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGE_LATER)
        libc.malloc_trim(0)
