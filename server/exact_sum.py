"""Sums of many tensors that do not depend on the order in which they come, in memory that does not grow with them.

Floating-point addition rounds, and by what came before; so the last bits of a plain sum tell who replied first, and
two runs of one study drift apart. Here every summand is first rounded to multiples of a power of two, which are whole
numbers, and whole numbers add up exactly:

    x = k g + rest,      k an int64 of at most 2^51,  |rest| <= g / 2

g follows from the largest value of the summand's own tensor, in steps of 2^6, and each g that occurs has a running sum
of its own; so a tensor of small values is not rounded to what a tensor of large ones can bear, and nothing depends on
what other summands are. Demmel and Nguyen, Parallel reproducible summation (IEEE Trans. Computers 64, 2015), have the
bins; that x + c, with c = 1.5 * 2^52 g, holds k in its last bits is the cut of Rump, Ogita and Oishi (ExtractVector,
SIAM J. Sci. Comput. 31, 2008).
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_SUMMANDS = 2**12 - 1
"""Of one tensor: more of them could leave an int64."""

_CODE_BITS = 51
"""Of a summand, without its sign: as many as a float64 can round to, and MOST_SUMMANDS of them fill an int64."""

_BIN_BITS = 6
_BINS = 8
"""Running sums of a tensor, at most; one or two, where sites are of one kind."""

_AT_ONCE = 65_536
"""Values that a core works on at a time: a float64 buffer of them stays in its cache."""


Summand = tuple[Tensor, float]
"""A flat tensor and its weight."""


class SpareMemory:
    """Memory of running sums that were taken, for the next round's. For the system to provide fresh pages takes as long
    as adding up eight updates, and a round's peak holds them anyway."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def get(self, name: str, size: int) -> Tensor:
        """(size,) int64, of any content."""
        kept = self._kept.pop(name, None)
        return torch.empty(size, dtype=torch.int64) if kept is None else kept

    def keep(self, name: str, codes: Tensor) -> None:
        """One for each tensor: what a round of unusual updates needed more is given back to the system."""
        self._kept[name] = codes


@dataclass
class _Bin:
    """sum of k over the summands, as the bits of c + k g: `count` times the bits of c too much.

    codes: of any content until something was `added`. waiting: a summand that is not in the sum yet. Two are added in
    one pass, for what takes time is going through the sums, which no cache holds.
    """

    codes: Tensor
    grid: float
    count: int = 0
    added: bool = False
    waiting: Summand | None = None


class ExactSum:
    """Running sums of named tensors, each times a weight; 8 bytes for each value and bin.

    largest: bound on |weight * value|. What is dropped of a value is at most 2^-46 of the largest one in its tensor, or
    2^-93 of `largest`: a float32 keeps its last bit down to 2^-22 of the first, a bfloat16 down to 2^-38. spare: of
    earlier sums over tensors of the same names and sizes.
    """

    def __init__(self, largest: float, spare: SpareMemory | None = None) -> None:
        self._top = math.ceil(math.log2(largest))
        self._sums: dict[str, dict[int, _Bin]] = {}
        self._spare = spare or SpareMemory()
        self._step = _AT_ONCE * torch.get_num_threads()
        self._buffers = torch.empty(3, self._step, dtype=torch.float64)

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """sum[name] += weight * tensor, each finite and of any float type; the product is rounded to float64.

        A tensor may be held until the next summand of its name comes, and must not change until then. Raises
        OverflowError: one more than MOST_SUMMANDS.
        """
        for name, tensor in tensors.items():
            flat = tensor.reshape(-1)
            found = self._bin_for(name, flat, weight)
            if found.count == MOST_SUMMANDS:
                raise OverflowError(f"more than {MOST_SUMMANDS} summands")
            found.count += 1
            if found.waiting is None:
                found.waiting = flat, weight
            else:
                self._add(found, [found.waiting, (flat, weight)])
                found.waiting = None

    def take(self, name: str, divisor: float) -> Tensor:
        """sum[name] / divisor, float32, flat; the sum itself is gone, and so is its memory."""
        return self._taken(name, divisor, torch.float32)

    def take_whole(self, name: str) -> Tensor:
        """sum[name], float64, flat; gone likewise."""
        return self._taken(name, 1.0, torch.float64)

    def _taken(self, name: str, divisor: float, dtype: torch.dtype) -> Tensor:
        bins = [found for _, found in sorted(self._sums.pop(name).items())]
        for found in bins:
            if found.waiting is not None:
                self._add(found, [found.waiting])
        result = torch.empty(len(bins[0].codes), dtype=dtype)
        for start, part in self._parts(result):
            total, value, code = (buffer[: len(part)] for buffer in self._buffers)
            total.zero_()
            for found in bins:
                surplus = found.count * _bits(_cutter(found.grid))
                wrapped = (surplus + 2**63) % 2**64 - 2**63  # as int64 wraps, so did the sum
                codes = found.codes[start : start + len(part)]
                total.add_(value.copy_(torch.sub(codes, wrapped, out=code.view(torch.int64))), alpha=found.grid)
            part.copy_(total.div_(divisor))
        for found in bins:
            self._spare.keep(name, found.codes)
        return result

    def _add(self, found: _Bin, summands: Sequence[Summand]) -> None:
        """To the bin's codes, in one pass."""
        cutter = _cutter(found.grid)
        for start, codes in self._parts(found.codes):
            coded = []
            for buffer, (flat, weight) in zip(self._buffers, summands, strict=False):
                x = buffer[: len(codes)].copy_(flat[start : start + len(codes)])
                if weight != 1.0:
                    x.mul_(weight)
                coded.append(x.add_(cutter).view(torch.int64))
            for other in coded[1:]:
                coded[0].add_(other)
            if found.added:
                codes.add_(coded[0])
            else:
                codes.copy_(coded[0])
        found.added = True

    def _parts(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(start, stretch) of a long tensor."""
        for start in range(0, len(flat), self._step):
            yield start, flat[start : start + self._step]

    def _bin_for(self, name: str, flat: Tensor, weight: float) -> _Bin:
        bins, index = self._sums.setdefault(name, {}), self._bin_of(flat, weight)
        if index not in bins:
            grid = 2.0 ** (self._top - _BIN_BITS * index - _CODE_BITS)
            bins[index] = _Bin(self._spare.get(name, len(flat)), grid)
        return bins[index]

    def _bin_of(self, flat: Tensor, weight: float) -> int:
        """0 for the largest values; each further one for values 2^6 times smaller, the last for all below."""
        least, most = torch.aminmax(flat)
        bound = weight * max(abs(least.item()), abs(most.item()))
        if bound == 0:
            return _BINS - 1
        return min((self._top - math.ceil(math.log2(bound))) // _BIN_BITS, _BINS - 1)


def _cutter(grid: float) -> float:
    """c for which c + x is c + x rounded to a multiple k of `grid`, with bits that are those of c plus k."""
    return grid * 1.5 * 2.0**52


def _bits(value: float) -> int:
    """A float64's bits as a whole number."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
