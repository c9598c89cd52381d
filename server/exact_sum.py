"""Sums of many tensors that do not depend on the order in which they come, in memory that does not grow with them.

Floating-point addition rounds, and by what came before; so the last bits of a plain sum tell who replied first, and
two runs of one study drift apart. Here every summand is first rounded to multiples of a power of two, which are whole
numbers, and whole numbers add up exactly:

    x = k g + rest,      k an int64 of at most 2^51,  |rest| <= g / 2

g follows from the largest value of the summand's own tensor, in steps of 2^6, and each g that occurs has a running sum
of its own; so a tensor of small values is not rounded to what a tensor of large ones can bear, and nothing depends on
what other summands are. Before so many have come that an int64 could overflow, the upper half of each sum is moved to
an int64 of its own, so there may be as many as will.

Demmel and Nguyen, Parallel reproducible summation (IEEE Trans. Computers 64, 2015), have the bins; that x + c, with
c = 1.5 * 2^52 g, holds k in its last bits is the cut of Rump, Ogita and Oishi (ExtractVector, SIAM J. Sci. Comput. 31,
2008).
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.loops import MOST_AT_ONCE, add_codes, join_codes
from server.measured import measured
from unimiss_core.stretches import AT_ONCE, stretches

MOST_SUMMANDS = 2**12 - 1
"""Of one tensor, in one int64: more of them could leave it."""

_CODE_BITS = 51
"""Of a summand, without its sign: as many as a float64 can round to, and MOST_SUMMANDS of them fill an int64."""

_BIN_BITS = 6
_BINS = 8
"""Running sums of a tensor, at most; one or two, where sites are of one kind."""

_LOW_BITS = 32
"""Of a sum, which stay where the upper ones are moved away; far fewer than one summand may have."""

_WAITING_BYTES = 8
"""For each value, of summands that wait to be added in one pass: four in bfloat16, two in float32. What takes time is
going through the sums, which no cache holds; and waiting, summands take no more memory than a sum."""


@dataclass(frozen=True)
class _Summand:
    """bin: by its largest value. flat: of any float type."""

    bin: int
    flat: Tensor
    weight: float


class SpareMemory:
    """Memory of running sums that were taken, for the next round's. For the system to provide fresh pages takes as long
    as adding up eight updates, and a round's peak holds them anyway."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def get(self, name: str, size: int) -> Tensor:
        """(size,) int64, of any content."""
        kept = self._kept.pop(name, None)
        return kept if kept is not None and len(kept) == size else torch.empty(size, dtype=torch.int64)

    def keep(self, name: str, codes: Tensor) -> None:
        """One for each tensor: what a round of unusual updates needed more is given back to the system."""
        self._kept[name] = codes


@dataclass
class _Bin:
    """sum of k over the summands, as the bits of c + k g: `count` times the bits of c too much.

    codes: of any content until something was `added`. high: what was moved away, in multiples of 2^_LOW_BITS; None
    while `codes` alone holds the sum.
    """

    codes: Tensor
    grid: float
    count: int = 0
    added: bool = False
    high: Tensor | None = None


class ExactSum:
    """Running sums of named tensors, each times a weight; 8 bytes for each value and bin, 16 where there are more than
    MOST_SUMMANDS.

    largest: bound on |weight * value|. What is dropped of a value is at most 2^-46 of the largest one in its tensor, or
    2^-93 of `largest`: a float32 keeps its last bit down to 2^-22 of the first, a bfloat16 down to 2^-38. spare: of
    earlier sums over tensors of the same names and sizes.
    """

    def __init__(self, largest: float, spare: SpareMemory | None = None) -> None:
        self._top = math.ceil(math.log2(largest))
        self._sums: dict[str, dict[int, _Bin]] = {}
        self._waiting: dict[str, list[_Summand]] = {}
        self._spare = spare or SpareMemory()
        self._buffers = torch.empty(3, AT_ONCE, dtype=torch.float64)

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """sum[name] += weight * tensor, each finite and of any float type; the product is rounded to float64.

        A tensor may be held until the next three summands of its name come, and must not change until then.
        """
        update = measured(tensors)
        for name, tensor in update.items():
            waiting = self._waiting.setdefault(name, [])
            waiting.append(_Summand(self._bin_of(weight * update.largest(name)), tensor.reshape(-1), weight))
            if sum(summand.flat.dtype.itemsize for summand in waiting) >= _WAITING_BYTES:
                self._add_waiting(name)

    def take(self, name: str, divisor: float) -> Tensor:
        """sum[name] / divisor, float32, flat; the sum itself is gone, and so is its memory."""
        return self._taken(name, divisor, torch.float32)

    def take_whole(self, name: str) -> Tensor:
        """sum[name], float64, flat; gone likewise."""
        return self._taken(name, 1.0, torch.float64)

    def _taken(self, name: str, divisor: float, dtype: torch.dtype) -> Tensor:
        self._add_waiting(name)
        bins = [found for _, found in sorted(self._sums.pop(name).items())]
        for found in bins:
            if found.high is not None:  # else its low half would tell when it was moved, and so its last bits
                self._move_high(found)
        result = torch.empty(len(bins[0].codes), dtype=dtype)
        if len(bins) == 1 and bins[0].high is None:
            join_codes(bins[0].codes, _surplus(bins[0]), bins[0].grid, divisor, result)
        else:
            self._join(bins, result, divisor)
        for found in bins:
            self._spare.keep(name, found.codes)
        return result

    def _join(self, bins: Sequence[_Bin], result: Tensor, divisor: float) -> None:
        """result <- the sum of the bins / divisor."""
        sums = [(found.codes, _surplus(found), found.grid) for found in bins]
        sums += [(found.high, 0, found.grid * 2.0**_LOW_BITS) for found in bins if found.high is not None]
        for part, *parts in stretches(result, *(codes for codes, _, _ in sums)):
            total, value, code = (buffer[: len(part)] for buffer in self._buffers)
            total.zero_()
            for codes, (_, surplus, grid) in zip(parts, sums, strict=True):
                value.copy_(torch.sub(codes, surplus, out=code.view(torch.int64)))
                total.add_(value, alpha=grid)
            part.copy_(total.div_(divisor))

    def _add_waiting(self, name: str) -> None:
        """To the sums of a tensor, each in one pass."""
        bins, waiting = self._sums.setdefault(name, {}), self._waiting.pop(name, [])
        for index in {summand.bin for summand in waiting}:
            summands = [summand for summand in waiting if summand.bin == index]
            if index not in bins:
                grid = 2.0 ** (self._top - _BIN_BITS * index - _CODE_BITS)
                bins[index] = _Bin(self._spare.get(name, len(summands[0].flat)), grid)
            self._add(bins[index], summands)

    def _add(self, found: _Bin, summands: Sequence[_Summand]) -> None:
        if found.count == MOST_SUMMANDS:
            self._move_high(found)
        fitting, others = summands[: (room := MOST_SUMMANDS - found.count)], summands[room:]
        self._add_codes(found, fitting)
        found.count += len(fitting)
        if others:
            self._add(found, others)

    def _add_codes(self, found: _Bin, summands: Sequence[_Summand]) -> None:
        """Those of one float type in one pass through the bin's codes."""
        cutter = _cutter(found.grid)
        for dtype in {summand.flat.dtype for summand in summands}:
            alike = [summand for summand in summands if summand.flat.dtype == dtype]
            for some in (alike[begin : begin + MOST_AT_ONCE] for begin in range(0, len(alike), MOST_AT_ONCE)):
                values, weights = [summand.flat for summand in some], [summand.weight for summand in some]
                add_codes(found.codes, values, weights, cutter, begun=found.added)
                found.added = True

    def _move_high(self, found: _Bin) -> None:
        """Leave the lowest bits of each sum in the bin's codes, so that MOST_SUMMANDS more fit in."""
        if found.high is None:
            found.high = torch.zeros_like(found.codes)
        for high, codes in stretches(found.high, found.codes):
            high += codes.sub_(_surplus(found)) >> _LOW_BITS
            codes.bitwise_and_(2**_LOW_BITS - 1)
        found.count = 0

    def _bin_of(self, bound: float) -> int:
        """0 for the largest values; each further one for values 2^6 times smaller, the last for all below."""
        if bound == 0:
            return _BINS - 1
        return min((self._top - math.ceil(math.log2(bound))) // _BIN_BITS, _BINS - 1)


def _surplus(found: _Bin) -> int:
    """What the bits of c come to in each of the bin's codes."""
    bits = found.count * _bits(_cutter(found.grid))
    return (bits + 2**63) % 2**64 - 2**63  # as int64 wraps, so did the sum


def _cutter(grid: float) -> float:
    """c for which c + x is c + x rounded to a multiple k of `grid`, with bits that are those of c plus k."""
    return grid * 1.5 * 2.0**52


def _bits(value: float) -> int:
    """A float64's bits as a whole number."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
