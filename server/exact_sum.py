"""Sums of many tensors that do not depend on the order in which they come, in memory that does not grow with them.

Floating-point addition rounds, and by what came before; so the last bits of a plain sum tell who replied first, and
two runs of one study drift apart. Here every summand is first cut at two fixed places into a coarse part, a fine part
and a rest that is dropped:

    x = h + l + rest,      h a multiple of 2^a,  l a multiple of 2^b,  |rest| <= 2^(b-1)

The cuts depend on no other summand. Multiples of one power of two add up without rounding as long as their sum stays
below 2^53 of it, so sum h and sum l are exact, whatever the order. Demmel and Nguyen, Parallel reproducible summation
(IEEE Trans. Computers 64, 2015); the cut itself is ExtractVector of Rump, Ogita and Oishi (SIAM J. Sci. Comput. 31,
2008): (x + c) - c with c = 1.5 * 2^52 multiples rounds x to the nearest multiple.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MOST_SUMMANDS = 4096
"""Of one tensor, up to which the promise holds; beyond it a sum is as good as any in float64, but of an order."""

_AT_ONCE = 32_768
"""Values that a core works on at a time: two float64 buffers of them stay in its cache."""


class ExactSum:
    """Running sums of groups of float32 tensors, each times a weight; 16 bytes for each value.

    largest: bound on |weight * value|. What is dropped of a summand is below 2^-80 of it: with the largest 1e3 and
    weights of 1, float32 values above 1e-14 are kept to their last bit.
    """

    def __init__(self, largest: float) -> None:
        coarse = _grid(largest)
        self._coarse = _cutter(coarse)
        self._fine = _cutter(_grid(coarse / 2))
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._step = _AT_ONCE * torch.get_num_threads()
        self._x, self._h = torch.empty(2, self._step, dtype=torch.float64)

    def add(self, group: str, tensors: Sequence[Tensor], weight: float) -> None:
        """sum[group] += weight * the tensors laid end to end; the product is rounded to float64."""
        if group not in self._sums:
            size = sum(tensor.numel() for tensor in tensors)
            self._sums[group] = _zeros(size), _zeros(size)
        start = 0
        for part in (part for tensor in tensors for part in tensor.reshape(-1).split(self._step)):
            high, low = (total[start : start + part.numel()] for total in self._sums[group])
            start += part.numel()
            self._add(part, weight, high, low)

    def _add(self, part: Tensor, weight: float, high: Tensor, low: Tensor) -> None:
        x, h = self._x[: part.numel()], self._h[: part.numel()]
        x.copy_(part)
        if weight != 1.0:
            x.mul_(weight)
        high.add_(torch.add(x, self._coarse, out=h).sub_(self._coarse))
        low.add_(x.sub_(h).add_(self._fine).sub_(self._fine))

    def take(self, group: str, divisor: float) -> Tensor:
        """sum[group] / divisor, float32, laid end to end; the sum itself is gone, and so is its memory."""
        high, low = self._sums.pop(group)
        return high.add_(low).div_(divisor).float()


def _zeros(size: int) -> Tensor:
    """From NumPy, which asks the system for large pages: a fifth of the time of torch's."""
    return torch.from_numpy(np.zeros(size))


def _grid(largest: float) -> float:
    """The power of two whose multiples up to `largest` can be added MOST_SUMMANDS times without rounding."""
    return float(2.0 ** (math.ceil(math.log2(largest * MOST_SUMMANDS)) + 1 - 53))


def _cutter(grid: float) -> float:
    """c for which (x + c) - c is x rounded to a multiple of `grid`."""
    return grid * 1.5 * 2.0**52
