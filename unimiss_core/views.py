"""Random views of scans, drawn in batches on the training device by one code for images and volumes.

    scan.crop(box)  ->  draw (V, C, *S)  ->  shade (B, V, C, *S)  ->  standardise  ->  what the model takes

Legend of shapes: B scans, V views, C channels, S spatial axes - (H, W) or (D, H, W).

The recipe is UniMiSS's (ECCV 2022: random resized crops, flips, blur, noise, brightness, contrast, gamma) in the
intensity range [0, 1]. We differ from it in four ways: a crop of a volume is zoomed in depth as in the plane (theirs
keeps 16 slices); images and volumes share one intensity recipe; blur comes before noise, as in a detector; and the
views of one scan are equals, where theirs blur the second view more often.

Resizing, mirroring and blurring are linear along each axis, so that one banded matrix does all three: a view costs one
product for each axis.

Every number is drawn on the CPU, so that views do not depend on the device. Each scan of a batch has a generator of
its own, split from the one given: a scan's views depend on that generator and on its place in the batch, not on the
other scans.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimiss_core.scan import Rank
from unimiss_core.study import ViewConfig

Box = tuple[slice, ...]
Interval = tuple[float, float]

_MEAN, _STD = 0.5, 0.25
_FLAT = 1e-3
"""A smaller range of values is rounding, which must not be stretched into a picture."""
_BLOCK_ROWS = 32
"""Rows of a banded matrix that a CPU multiplies at a time: fewer waste less on zeros, more keep its units busy."""
_BLUR_REACH = 5.0
"""Standard deviations after which a Gaussian ends: 6e-7 of it lies beyond."""


class Croppable(Protocol):
    """A scan that views can be cut from without reading all of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, *S)"""

    def crop(self, box: Box) -> NDArray[np.float32]:
        """Values in [0, 1] of a box along S: (C, *box)."""


def draw_batch(
    scans: Sequence[Croppable],
    config: ViewConfig,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    *,
    part: slice | None = None,
) -> Tensor:
    """`config.views` views of each scan as the model takes them: (B, V, C, *S) on `device`.

    The scans are of one rank and have equally many channels.
    part: the scans of the batch to draw, for one of several processes that share it: their views are those that the
        whole batch would have had, and B counts them alone. No other scan is read.
    """
    placing, shading = split(generator), split(generator)
    generators = [(split(placing), split(shading)) for _ in scans]  # of all scans: a place in the batch keeps its own
    wanted = part or slice(None)
    channels, *lengths = scans[0].shape
    size = config.size_of(rank_of(lengths))
    views = torch.empty(len(scans[wanted]), config.views, channels, *size, device=device)
    for scan, (placed, own), places in zip(scans[wanted], generators[wanted], views, strict=True):
        strengths = draw_strengths(config, own)
        crops = draw(scan, config, placed, blur_sigma=[each.blur_sigma for each in strengths], device=device)
        # Each view is finished before the next is begun, so that it stays in the processor's cache.
        for place, view, strength in zip(places, crops, strengths, strict=True):
            shade_(view, strength, own)
            standardise(view, out=place)
    return views


def whole(values: NDArray[np.float32], size: Sequence[int]) -> Tensor:
    """All of a prepared scan, values (C, *S) in [0, 1], as the model takes it: (C, *size).

    Nothing random, for embedding and probing. The sides' ratio is not kept, as in the views of training.
    """
    return standardise(resize(torch.from_numpy(values), size))


def standardise(views: Tensor, *, out: Tensor | None = None) -> Tensor:
    """[0, 1] -> [-2, 2], the range that the model takes: (x - 0.5) / 0.25."""
    return torch.add(torch.tensor(-_MEAN / _STD), views, alpha=1 / _STD, out=out)


def intensities(views: Tensor) -> Tensor:
    """[-2, 2] -> [0, 1]: `standardise` undone."""
    return views * _STD + _MEAN


def min_max(x: Tensor) -> Tensor:
    """x (N, C, *S) -> each of N from 0 at its lowest value to 1 at its highest; 0 throughout where it is flat."""
    axes = tuple(range(1, x.ndim))
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    return (x - low) / (high - low).clamp(min=_FLAT)


def generator_for(seed: int, site: str, *place: int) -> torch.Generator:
    """The generator of one batch, by study seed, site and place in the study (global step, or round and step).

    The same on every machine. It serves augmentation, not privacy: torch's CPU generator uses 32 bits of its seed.
    """
    digest = hashlib.sha256(json.dumps([seed, site, *place]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def split(generator: torch.Generator) -> torch.Generator:
    """A new generator, seeded by one draw from `generator`."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))


# ---------------------------------------------------------------------------------------------------------- geometry


def draw(
    scan: Croppable,
    config: ViewConfig,
    generator: torch.Generator,
    *,
    blur_sigma: Sequence[float] = (),
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Random resized crops of one scan, some of them mirrored, each blurred: V times (C, *S) in [0, 1].

    blur_sigma: standard deviation of each view's blur in pixels of the view; 0 and an empty sequence mean none.

    Random resized crops: Inception (arXiv:1409.4842), as used by DINO and UniMiSS. A crop larger than the scan is cut
    to it, where torchvision would draw again.
    """
    lengths = scan.shape[1:]
    rank = rank_of(lengths)
    size = config.size_of(rank)
    region = _region(lengths, size, config.volume_region if rank == 3 else None, _uniform(rank, generator=generator))
    placements = _uniform(config.views, 2 + 2 * rank, generator=generator)
    for shares, sigma in zip(placements, blur_sigma or [0.0] * config.views, strict=True):
        crop = torch.from_numpy(scan.crop(_crop(region, size, config, shares[: 2 + rank]))).to(device)
        mirrored = [share < chance for share, chance in zip(shares[2 + rank :], config.flip[-rank:], strict=True)]
        yield resize(crop, size, mirrored=mirrored, blur_sigma=sigma)


def rank_of(lengths: Sequence[int]) -> Rank:
    """2 or 3, from the lengths of the spatial axes. Raises ValueError: neither."""
    if len(lengths) == 2:
        return 2
    if len(lengths) == 3:
        return 3
    raise ValueError(f"expected (H, W) or (D, H, W), got {tuple(lengths)}")


def _region(lengths: Sequence[int], size: Sequence[int], scale: float | None, shares: Sequence[float]) -> Box:
    """Where all views of one scan lie: a random box of `scale` times the view's size, within the scan."""
    everything = tuple(slice(0, length) for length in lengths)
    return everything if scale is None else _place(everything, [scale * length for length in size], shares)


def _crop(region: Box, size: Sequence[int], config: ViewConfig, shares: Sequence[float]) -> Box:
    """A random box in `region` that becomes one view of `size`."""
    area = _between(config.area, shares[0])
    aspect = math.exp(_between((math.log(config.aspect[0]), math.log(config.aspect[1])), shares[1]))
    aspect *= size[-2] / size[-1]
    *depth, height, width = (side.stop - side.start for side in region)
    surface = area * height * width
    wanted = [math.sqrt(area) * depth[0]] if depth else []
    return _place(region, [*wanted, math.sqrt(surface * aspect), math.sqrt(surface / aspect)], shares[2:])


def _place(within: Box, wanted: Sequence[float], shares: Sequence[float]) -> Box:
    """A box of about the `wanted` lengths in `within`; shares in [0, 1) say how far along each axis it lies."""
    box = []
    for side, length, share in zip(within, wanted, shares, strict=True):
        room = side.stop - side.start
        taken = min(room, max(1, round(length)))
        start = side.start + int(share * (room - taken + 1))
        box.append(slice(start, start + taken))
    return tuple(box)


def _uniform(*shape: int, generator: torch.Generator) -> Any:
    """Nested lists of random numbers in [0, 1)."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).tolist()


def _between(interval: Interval, share: float) -> float:
    low, high = interval
    return low + share * (high - low)


# -------------------------------------------------------------------------------------------------------- resampling

_Block = tuple[slice, slice, NDArray[np.float32]]
"""Rows and columns of a matrix, and its values there."""


def resize(x: Tensor, size: Sequence[int], *, mirrored: Sequence[bool] = (), blur_sigma: float = 0.0) -> Tensor:
    """x (C, *S) on a grid of `size`, mirrored along the axes that say so, then blurred: (C, *size).

    Linear between neighbours; where an axis shrinks, averaged over what falls between (no aliasing): Pillow's bilinear
    filter. The blur is a Gaussian, `blur_sigma` points of the new grid wide along every axis.
    """
    channels, *lengths = x.shape
    for axis in reversed(range(len(size))):
        mirror = bool(mirrored) and mirrored[axis]
        blocks = list(_sampling(lengths[axis], size[axis], mirror=mirror, blur_sigma=blur_sigma, in_one=not x.is_cpu))
        x = _along_last(x, size[axis], blocks)  # its new axis comes first: the next one to do is last again
    return x.movedim(-1, 0).reshape(channels, *size)


def _along_last(x: Tensor, length: int, blocks: Sequence[_Block]) -> Tensor:
    """x (..., n) times a matrix (length, n), given by its blocks, along the last axis: (length, ...)."""
    flat = x.reshape(-1, x.shape[-1])
    result = x.new_empty(length, len(flat))
    for rows, columns, values in blocks:
        torch.mm(torch.from_numpy(values).to(x.device), flat[:, columns].mT, out=result[rows])
    return result.view(length, *x.shape[:-1])


def _sampling(length: int, size: int, *, mirror: bool, blur_sigma: float, in_one: bool) -> Iterator[_Block]:
    """The matrix (size, length) that brings `length` points to `size`, mirrors and blurs them, by blocks of rows.

    It is a band, and a CPU gains by leaving the zeros out; on a GPU the launches would cost more: `in_one` block.
    """
    shrink = shrink_matrix(length, size)
    blur = blur_matrix(blur_sigma, size) if blur_sigma > 0 else None
    reach = math.ceil(_BLUR_REACH * blur_sigma)
    step = size if in_one else _BLOCK_ROWS
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        near = slice(max(0, rows.start - reach), min(size, rows.stop + reach))
        columns = _support(near, length, size)
        values = shrink[near, columns]
        if blur is not None:
            values = np.matmul(blur[rows, near], values)
        if mirror:
            rows, values = slice(size - rows.stop, size - rows.start), values[::-1].copy()
        yield rows, columns, values


def _support(rows: slice, length: int, size: int) -> slice:
    """The columns of `shrink_matrix` that `rows` may use."""
    step = length / size
    reach = max(1.0, step)
    first, last = (rows.start + 0.5) * step - 0.5, (rows.stop - 0.5) * step - 0.5
    return slice(max(0, math.floor(first - reach)), min(length, math.ceil(last + reach) + 1))


@lru_cache(maxsize=128)
def shrink_matrix(length: int, size: int) -> NDArray[np.float32]:
    """(size, length): row i holds a triangle about the old place of new point i, as wide as the coarser grid's step.

    Rows sum to 1. Do not write into it: it is kept.
    """
    step = length / size
    reach = max(1.0, step)
    centres = (np.arange(size)[:, None] + 0.5) * step - 0.5
    taps = np.floor(centres - reach).astype(int) + 1 + np.arange(math.ceil(2 * reach))
    weights = np.maximum(0.0, 1 - np.abs(taps - centres) / reach) * ((0 <= taps) & (taps < length))
    margin = math.ceil(reach)
    matrix = np.zeros((size, length + 2 * margin), dtype=np.float32)
    matrix[np.arange(size)[:, None], taps + margin] = weights / weights.sum(axis=1, keepdims=True)
    return matrix[:, margin:-margin]


@lru_cache(maxsize=8)
def blur_matrix(sigma: float, length: int) -> NDArray[np.float32]:
    """(length, length): row i holds the weights of a Gaussian of `sigma` > 0 about i; rows sum to 1.

    Beyond an edge the signal is its mirror image, (d c b a | a b c d | d c b a), as in scipy.ndimage's `reflect`: it
    repeats after 2 length points, and so may the weights. Do not write into it: it is kept for the next axis.
    """
    reach = math.ceil(_BLUR_REACH * sigma)
    distances = np.arange(-reach, reach + 1)
    weights = np.exp(-((distances / sigma) ** 2) / 2)
    period = np.bincount(distances % (2 * length), weights / weights.sum(), minlength=2 * length)
    signal = np.concatenate([period, period[: length + 1]]).astype(np.float32)
    size, step = (length, length), signal.itemsize
    # Entry (i, j) of the first is of distance i - j + 2 length, of the second i + j + 1: to the mirror image.
    straight = np.ndarray(size, np.float32, signal, offset=2 * length * step, strides=(step, -step))
    mirrored = np.ndarray(size, np.float32, signal, offset=step, strides=(step, step))
    return np.asarray(straight + mirrored)


# ------------------------------------------------------------------------------------------------------- intensities


class Strengths(NamedTuple):
    """How strongly one view is changed; 0 or 1 where it is not.

    The five are nnU-Net's (Isensee et al. 2021, supplement), which UniMiSS uses through batchgenerators.
    """

    blur_sigma: float = 0.0
    noise_sigma: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    gamma: float = 1.0


def draw_strengths(config: ViewConfig, generator: torch.Generator) -> list[Strengths]:
    """Of each view of one scan: every change happens with its chance, and is drawn uniformly from its interval."""
    table: tuple[tuple[float, Interval], ...] = (
        (config.blur, config.blur_sigma),
        (config.noise, config.noise_sigma),
        (config.brightness, config.brightness_factor),
        (config.contrast, config.contrast_factor),
        (config.gamma, config.gamma_exponent),
    )
    return [
        Strengths(
            *(
                _between(interval, how) if share < chance else nothing
                for (chance, interval), share, how, nothing in zip(table, happens, hows, Strengths(), strict=True)
            )
        )
        for happens, hows in _uniform(config.views, 2, len(table), generator=generator)
    ]


def shade_(x: Tensor, strengths: Strengths, generator: torch.Generator) -> None:
    """Noise, brightness, contrast about the mean, and gamma, in place and in this order. x: (C, *S) in [0, 1].

    Clipping to [0, 1] before gamma stands for the `preserve_range` of batchgenerators.
    """
    if strengths.noise_sigma > 0:
        x.add_(normal(x.shape, generator).to(x.device), alpha=strengths.noise_sigma)
    # Brightness times (mean + contrast times (x - mean)), in one pass.
    shift = (
        x.mean() * (strengths.brightness * (1 - strengths.contrast)) if strengths.contrast != 1 else torch.tensor(0.0)
    )
    torch.add(shift, x, alpha=strengths.brightness * strengths.contrast, out=x)
    x.clamp_(0.0, 1.0)
    if strengths.gamma != 1:
        _apply_gamma_(x, strengths.gamma)


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normally distributed numbers of mean 0 and deviation 1, each one of 65,536 quantiles: none lies beyond 4.4.

    Three times as fast as torch's own, and as good for noise in a picture.
    """
    count = math.prod(shape)
    seed = int(torch.randint(2**62, (), generator=generator))
    chosen = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return torch.from_numpy(_quantiles().take(chosen, mode="clip")).view(*shape)


@lru_cache(maxsize=1)
def _quantiles() -> NDArray[np.float32]:
    """(65536,) of the normal distribution, rising, at the middles of equal shares."""
    shares = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return np.asarray(torch.special.ndtri(shares).float().numpy())


def _apply_gamma_(x: Tensor, exponent: float) -> None:
    """x -> x ** exponent, in place."""
    if x.is_cpu:  # three times as fast as torch's power; keeps 0 at 0
        x.log2_().mul_(exponent).exp2_()
    else:
        x.pow_(exponent)
