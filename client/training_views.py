"""What a task's model sees in training: random crops of whole scans, or windows of scans with their masks.

Legend of shapes: C channels, S spatial axes of the input - (H, W) or (D, H, W). Every draw takes a generator.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimiss_core.task_config import AugmentationConfig
from unimiss_core.views import Box, Croppable, Strengths, resize, shade_, standardise

_NOISE_SIGMA, _BRIGHTNESS, _CONTRAST, _GAMMA = (0.0, 0.05), (0.8, 1.2), (0.75, 1.25), (0.8, 1.25)
"""Milder than in pretraining: what is shaded away here may be what the label is about."""


class Masked(Croppable, Protocol):
    """A scan with a class for each voxel."""

    @property
    def places(self) -> Mapping[int, NDArray[np.int32]]:
        """Class that is there -> (n, rank) indices of some of its voxels."""

    def classes_in(self, box: Box) -> NDArray[np.integer[Any]]:
        """Of a box along S: (*box)."""


def crop_of(
    one: Croppable,
    size: Sequence[int],
    config: AugmentationConfig,
    generator: torch.Generator,
    *,
    shades_apart: bool = False,
) -> Tensor:
    """A random crop of the scan, shrunk to `size`, perhaps mirrored and shaded, as the model takes it: (C, *size).

    shades_apart: each channel is shaded by itself, as MR sequences are, and the colours of one picture are not.
    """
    lengths = one.shape[1:]
    share = math.sqrt(_between(config.area, _uniform(1, generator)[0]))
    box = []
    for length, where in zip(lengths, _uniform(len(lengths), generator), strict=True):
        taken = max(1, round(share * length))
        start = int(where * (length - taken + 1))
        box.append(slice(start, start + taken))
    mirrored = [
        chance > draw for chance, draw in zip(config.flip[-len(size) :], _uniform(len(size), generator), strict=True)
    ]
    view = resize(torch.from_numpy(one.crop(tuple(box))), size, mirrored=mirrored)
    _shade_(view, config, generator, apart=shades_apart)
    return standardise(view)


def window_of(
    one: Masked,
    size: Sequence[int],
    config: AugmentationConfig,
    generator: torch.Generator,
    *,
    foreground: float,
    shades_apart: bool = False,
) -> tuple[Tensor, Tensor]:
    """A window of the scan and of its mask, not stretched: (C, *size) as the model takes it, and (*size) of classes.

    foreground: the chance that the window is laid about a voxel of a class, each class being as likely as another.
    Beyond the scan there is 0 and background, as in inference. shades_apart: as of `crop_of`.
    """
    lengths, rank = one.shape[1:], len(size)
    about = _foreground_voxel(one, generator) if _uniform(1, generator)[0] < foreground else None
    starts = []
    for axis, share in enumerate(_uniform(rank, generator)):
        low, high = min(0, lengths[axis] - size[axis]), max(0, lengths[axis] - size[axis])
        if about is not None:
            low, high = max(low, about[axis] - size[axis] + 1), min(high, about[axis])
        starts.append(low + int(share * (high - low + 1)))
    box = tuple(slice(max(0, s), min(n, s + side)) for s, n, side in zip(starts, lengths, size, strict=True))
    into = tuple(slice(b.start - s, b.stop - s) for b, s in zip(box, starts, strict=True))
    values = np.zeros((one.shape[0], *size), dtype=np.float32)
    values[(slice(None), *into)] = one.crop(box)
    classes = np.zeros(tuple(size), dtype=np.int64)
    classes[into] = one.classes_in(box)
    view, truth = torch.from_numpy(values), torch.from_numpy(classes)
    turned = [a for a, draw in enumerate(_uniform(rank, generator)) if draw < config.flip[-rank:][a]]
    view, truth = view.flip([a + 1 for a in turned]), truth.flip(turned)
    _shade_(view, config, generator, apart=shades_apart)
    return standardise(view), truth


def _foreground_voxel(one: Masked, generator: torch.Generator) -> list[int] | None:
    if not one.places:
        return None
    which, where = _uniform(2, generator)
    voxels = one.places[sorted(one.places)[int(which * len(one.places))]]
    return [int(index) for index in voxels[int(where * len(voxels))]]


def _shade_(view: Tensor, config: AugmentationConfig, generator: torch.Generator, *, apart: bool) -> None:
    for channels in view.split(1) if apart else (view,):
        shade_(channels, _strengths(config.intensity, generator), generator)


def _strengths(chance: float, generator: torch.Generator) -> Strengths:
    happens, how = _uniform(4, generator), _uniform(4, generator)
    ranges = (_NOISE_SIGMA, _BRIGHTNESS, _CONTRAST, _GAMMA)
    noise, brightness, contrast, gamma = (
        _between(interval, h) if draw < chance else plain
        for interval, h, draw, plain in zip(ranges, how, happens, (0.0, 1.0, 1.0, 1.0), strict=True)
    )
    return Strengths(noise_sigma=noise, brightness=brightness, contrast=contrast, gamma=gamma)


def _uniform(count: int, generator: torch.Generator) -> list[float]:
    """Random numbers in [0, 1)."""
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


def _between(interval: tuple[float, float], share: float) -> float:
    return interval[0] + share * (interval[1] - interval[0])
