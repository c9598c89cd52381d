"""Where the C library puts what a step on a CPU allocates.

The first step over scans of a size also makes what stays for ever: the kernels of each shape of product, half a
megabyte each. On one heap with that step's activations they end up scattered between them, and later activations, which
are larger than the gaps, make the heap grow: by 40 MB where this was measured (docs/performance.md). So in a first step
whatever is large gets pages of its own, which are given back when it is freed; kernels lie side by side, and what later
steps allocate comes and goes behind them.

Of glibc alone, where nobody has set it otherwise; any other C library is left as it is.
"""

import ctypes
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from unimiss_core.execution import Execution

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's settings (mallopt(3))."""

_LARGE_AT_FIRST, _LARGE_LATER = 256 << 10, 32 << 20
"""Bytes from which an allocation has pages of its own. The second is what glibc itself comes to, and its most."""


_SET_BY_SOMEONE = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
"""Variables by which an operator sets them."""


class MemoryOfSteps:
    """Which sizes of scans have been met."""

    def __init__(self, execution: Execution) -> None:
        self._is_needed = execution.device.type == "cpu" and execution.precision == "bf16"
        self._met: set[torch.Size] = set()

    @contextmanager
    def laid_out(self, parts: Sequence[Tensor]) -> Iterator[None]:
        """Around passes over a batch in parts: in bfloat16 on a CPU the first of their sizes lay memory out for the
        others."""
        sizes = {part.shape for part in parts}
        with large_apart() if self._is_needed and sizes - self._met else nullcontext():
            yield
        self._met |= sizes


@contextmanager
def large_apart() -> Iterator[None]:
    """Around a first step. For the whole process: from then on glibc's settings are no longer adapted by itself. Where
    two overlap, the first to end ends both, which costs the other some gaps."""
    if platform.libc_ver()[0] != "glibc" or not _SET_BY_SOMEONE.isdisjoint(os.environ):
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
