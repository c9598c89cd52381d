"""Where noise is added: Gaussian noise, and draws of patients, that nobody outside can draw again.

torch's CPU generator keeps 32 bits of its seed (`unimiss_core.views.generator_for`): four thousand million tries would
find it. NumPy's Philox takes a key of 128 bits from the operating system. It is no generator for cryptography either,
and floating-point noise has gaps that Mironov (2012) shows how to read; docs/privacy.md says so.
"""

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_PIECE = 2**16
"""Values drawn at a time: as many again as a whole table holds would add to a step's peak of memory."""


class Noise(Protocol):
    """A source of noise: one method, so that another stream, one that is correlated over steps say, can stand in."""

    def add_(self, sums: Sequence[Tensor], deviation: float) -> None:
        """Add noise of this standard deviation to every value of `sums`."""
        ...


class GaussianNoise:
    """Independent N(0, deviation^2), from a generator of its own: neither the study's seed, which is public, nor a
    round that is gone on with draws the same noise twice. A GPU draws its own, from a seed of 64 bits."""

    def __init__(self, device: torch.device) -> None:
        self._generator = secret_generator()
        self._on_gpu = torch.Generator(device).manual_seed(_entropy(8)) if device.type == "cuda" else None

    @torch.no_grad()
    def add_(self, sums: Sequence[Tensor], deviation: float) -> None:
        """Raises ValueError: so small a deviation, or one that is not finite, is none in the precision of `sums`."""
        for total in sums:
            finest = torch.finfo(total.dtype)
            if not finest.tiny <= deviation <= finest.max:
                raise ValueError(f"noise of standard deviation {deviation:g} would be lost in {total.dtype}")
            for piece in total.view(-1).split(_PIECE):
                piece.add_(self._drawn_like(piece), alpha=deviation)

    def _drawn_like(self, piece: Tensor) -> Tensor:
        if self._on_gpu is not None:
            return torch.randn(piece.shape, generator=self._on_gpu, device=piece.device, dtype=piece.dtype)
        dtype = np.float64 if piece.dtype == torch.float64 else np.float32
        return torch.from_numpy(self._generator.standard_normal(len(piece), dtype=dtype))


def secret_generator(key: int | None = None) -> np.random.Generator:
    """A generator that starts where nobody knows; `key`, 128 bits, for those who share one."""
    return np.random.Generator(np.random.Philox(key=_entropy(16) if key is None else key))


def _entropy(size: int) -> int:
    return int.from_bytes(os.urandom(size), "little")
