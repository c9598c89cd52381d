"""Where noise is added: Gaussian noise, and draws of patients, that nobody outside can draw again.

torch's CPU generator keeps 32 bits of its seed (`unimiss_core.views.generator_for`): four thousand million tries would
find it. NumPy's Philox takes a key of 128 bits from the operating system. It is no generator for cryptography either,
and floating-point noise has gaps that Mironov (2012) shows how to read; docs/privacy.md says so.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_PIECE = 2**15
"""Values drawn at a time: as many again as a whole table holds would add to a step's peak of memory. Of more than these
torch makes threads of its own, beside those that draw."""


class Noise(Protocol):
    """A source of noise: one method, so that another stream, one that is correlated over steps say, can stand in."""

    def add_(self, sums: Sequence[Tensor], deviation: float) -> None:
        """Add noise of this standard deviation to every value of `sums`."""
        ...


class GaussianNoise:
    """Independent N(0, deviation^2), from a key of its own: neither the study's seed, which is public, nor a round that
    is gone on with draws the same noise twice. On a CPU as many threads as torch has draw side by side, each from its
    own part of the key's stream. A GPU draws its own, from a seed of 64 bits."""

    def __init__(self, device: torch.device) -> None:
        self._generators: Sequence[np.random.Generator | torch.Generator] = (
            [torch.Generator(device).manual_seed(_entropy(8))]
            if device.type == "cuda"
            else secret_generators(torch.get_num_threads())
        )

    @torch.no_grad()
    def add_(self, sums: Sequence[Tensor], deviation: float) -> None:
        """Raises ValueError: so small a deviation, or one that is not finite, is none in the precision of `sums`."""
        pieces: list[Tensor] = []
        for total in sums:
            finest = torch.finfo(total.dtype)
            if not finest.tiny <= deviation <= finest.max:
                raise ValueError(f"noise of standard deviation {deviation:g} would be lost in {total.dtype}")
            pieces += total.view(-1).split(_PIECE)
        add, many = partial(_add_to_each_, deviation=deviation), len(self._generators)
        if many == 1:
            add(self._generators[0], pieces)  # in this thread, which has the GPU's stream
            return
        with ThreadPoolExecutor(many) as threads:
            for _ in threads.map(add, self._generators, [pieces[place::many] for place in range(many)]):
                pass  # an error of any of them is met here


def _add_to_each_(
    generator: np.random.Generator | torch.Generator, pieces: Sequence[Tensor], *, deviation: float
) -> None:
    for piece in pieces:
        piece.add_(_normal_like(piece, generator), alpha=deviation)


def _normal_like(piece: Tensor, generator: np.random.Generator | torch.Generator) -> Tensor:
    if isinstance(generator, torch.Generator):
        return torch.randn(piece.shape, generator=generator, device=piece.device, dtype=piece.dtype)
    dtype = np.float64 if piece.dtype == torch.float64 else np.float32
    return torch.from_numpy(generator.standard_normal(len(piece), dtype=dtype))


def secret_generators(count: int) -> list[np.random.Generator]:
    """That start where nobody knows, and never meet: each has 2^128 draws of one stream to itself."""
    stream = np.random.Philox(key=_entropy(16))
    return [np.random.Generator(stream.jumped(place)) for place in range(count)]


def secret_generator(key: int | None = None) -> np.random.Generator:
    """A generator that starts where nobody knows; `key`, 128 bits, for those who share one."""
    return np.random.Generator(np.random.Philox(key=_entropy(16) if key is None else key))


def _entropy(size: int) -> int:
    return int.from_bytes(os.urandom(size), "little")
