"""What values travel as: the one place where the wire's formats are told apart.

    fp32   4 bytes a value    exact
    bf16   2 bytes            rounded to 8 bits of mantissa, each value by itself
    int8   1 + 2/128 bytes    128 neighbours share a scale; what rounding loses is carried over by the sender

Every operation is one IEEE operation per value, so that all machines get the same bits from the same values.
"""

import io
import math
import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unimiss_core.errors import WireError

BLOCK = 128
"""Values that share a scale. Measured on real updates (docs/federation.md): half as many lose 7% less and cost 1.5%
more bytes, twice as many lose 8% more and save 0.8%."""

LARGEST_CODE = 127

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The smallest normal float32: a block of zeros has this scale, so that none is 0 or denormal."""


class Format(Protocol):
    """How a vector becomes bytes and comes back."""

    @property
    def carries_over(self) -> bool:
        """Whether it is too coarse for weights: only steps travel in it, what rounding loses is added to the next one,
        and whole weights travel in fp32."""
        ...

    def num_bytes(self, size: int) -> int:
        """Bytes of `size` values, exactly."""
        ...

    def encode(self, parts: Sequence[Tensor]) -> bytes:
        """Flat tensors, end to end -> little-endian bytes. A value that is not finite is still seen not to be by the
        receiver."""
        ...

    def rounded_(self, flat: Tensor) -> Tensor:
        """flat (N,), float32, as its receiver decodes it: the same tensor. Raises WireError."""
        ...

    def decode(self, payload: bytes, size: int) -> Tensor:
        """The inverse, (N,) in float32; payload has `num_bytes(size)` bytes. Raises WireError."""
        ...

    def view(self, payload: bytes, size: int) -> Tensor:
        """The same values in the narrowest float type that holds them, in the payload's own memory where they lie there
        as such: to be read, never written to. Raises WireError."""
        ...


class Floats:
    """Each value rounded to a float type, to nearest, ties to even."""

    carries_over = False

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def num_bytes(self, size: int) -> int:
        return size * self._dtype.itemsize

    def encode(self, parts: Sequence[Tensor]) -> bytes:
        payload = io.BytesIO(bytes(self.num_bytes(sum(map(len, parts)))))
        with payload.getbuffer() as memory:  # of the very bytes that are returned: a copy would take as long again
            self._lay(parts, memory)
        return payload.getvalue()

    def _lay(self, parts: Sequence[Tensor], memory: memoryview) -> None:
        flat = torch.from_numpy(np.frombuffer(memory, np.uint8)).view(self._dtype)
        for place, part in zip(flat.split([len(part) for part in parts]), parts, strict=True):
            place.copy_(part)

    def rounded_(self, flat: Tensor) -> Tensor:
        return flat if flat.dtype == self._dtype else flat.copy_(flat.to(self._dtype))

    def decode(self, payload: bytes, size: int) -> Tensor:
        return _widened(payload, self._dtype, size)

    def view(self, payload: bytes, size: int) -> Tensor:
        with warnings.catch_warnings(action="ignore"):  # torch warns that nobody should write to it
            return torch.frombuffer(payload, dtype=self._dtype, count=size)


class ScaledBlocks:
    """x ~ code * scale, with codes -127 to 127, and for each block of values one scale, its largest |x| / 127.

    |x - code * scale| <= scale / 2. Scales are bfloat16 rounded up: no code is cut off, and since a code has 7 bits and
    a scale 8, their product is exact in float32, and so is x minus it. Payload: all scales, then all codes.
    """

    carries_over = True

    def num_bytes(self, size: int) -> int:
        return 2 * math.ceil(size / BLOCK) + size

    def encode(self, parts: Sequence[Tensor]) -> bytes:
        flat = torch.cat(list(parts)).float()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scales = _scales_of(blocks)
        codes = (blocks / scales[:, None]).round_().nan_to_num_()  # a block with a NaN scale is all NaN here
        return _bytes_of(scales.bfloat16()) + _bytes_of(codes.to(torch.int8).view(-1)[: len(flat)])

    def rounded_(self, flat: Tensor) -> Tensor:
        return flat.copy_(self.decode(self.encode([flat]), len(flat)))

    def decode(self, payload: bytes, size: int) -> Tensor:
        scales = _widened(payload, torch.bfloat16, math.ceil(size / BLOCK))
        if not bool(scales.isfinite().all()):
            raise WireError("not_finite", "a block of values has a scale that is not a finite number")
        if not bool((scales >= SMALLEST_SCALE).all()):
            raise WireError("malformed", "a block of values has a scale that is not above zero")
        codes = np.frombuffer(payload, np.int8, count=size, offset=2 * len(scales)).astype(np.float32)
        return torch.from_numpy(codes).mul_(scales.repeat_interleave(BLOCK)[:size])

    def view(self, payload: bytes, size: int) -> Tensor:
        return self.decode(payload, size)


FORMATS: dict[str, Format] = {"bf16": Floats(torch.bfloat16), "fp32": Floats(torch.float32), "int8": ScaledBlocks()}
"""`wire.dtype` of a study -> how."""


def _scales_of(blocks: Tensor) -> Tensor:
    """blocks (N, BLOCK) -> (N,), float32 holding bfloat16 values; NaN where a block holds a NaN or an infinity."""
    largest = blocks.abs().amax(dim=1)
    least = (largest / LARGEST_CODE).clamp_min(SMALLEST_SCALE)
    up = ((least.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)  # bfloat16 is float32's upper half
    return torch.where(largest.isfinite(), up, math.nan)


def _widened(payload: bytes, dtype: torch.dtype, size: int) -> Tensor:
    """The payload's first `size` values in float32. NumPy reads bytes where they are and asks for large pages: a fifth
    of the time that torch takes for a bytearray's copy and its conversion."""
    if dtype == torch.float32:
        return torch.from_numpy(np.frombuffer(payload, "<f4", count=size).copy())
    halves = np.frombuffer(payload, "<u2", count=size)
    return torch.from_numpy(np.left_shift(halves, 16, dtype=np.uint32).view(np.float32))  # as in `_scales_of`


def _bytes_of(values: Tensor) -> bytes:
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
