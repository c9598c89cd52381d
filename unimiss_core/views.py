"""Random views of scans, drawn in batches on the training device by one code for images and volumes.

    scan.crop(box)  ->  draw (V, C, *S)  ->  augment (B, V, C, *S)  ->  standardise  ->  what the model takes

Legend of shapes: B scans, V views, C channels, S spatial axes - (H, W) or (D, H, W).

The recipe is UniMiSS's (ECCV 2022: random resized crops, flips, blur, noise, brightness, contrast, gamma) in the
intensity range [0, 1]. We differ from it in four ways: a crop of a volume is zoomed in depth as in the plane (theirs
keeps 16 slices); images and volumes share one intensity recipe; blur comes before noise, as in a detector; and the
views of one scan are equals, where theirs blur the second view more often.

Every number is drawn on the CPU, so that views do not depend on the device. Each scan of a batch has a generator of
its own, split from the one given: a scan's views depend on that generator and on its place in the batch, not on the
other scans.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unimiss_core.scan import Rank
from unimiss_core.study import ViewConfig

Box = tuple[slice, ...]
Interval = tuple[float, float]

_MEAN, _STD = 0.5, 0.25
_CACHED_VALUES = 2**19
"""Values that a CPU shades at a time: they stay in its cache from one augmentation to the next."""


class Croppable(Protocol):
    """A scan that views can be cut from without reading all of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, *S)"""

    def crop(self, box: Box) -> NDArray[np.float32]:
        """Values in [0, 1] of a box along S: (C, *box)."""


def draw_batch(
    scans: Sequence[Croppable], config: ViewConfig, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """`config.views` views of each scan as the model takes them: (B, V, C, *S) on `device`.

    The scans are of one rank and have equally many channels.
    """
    placing, shading = split(generator), split(generator)
    channels, *lengths = scans[0].shape
    views = torch.empty(len(scans), config.views, channels, *config.size_of(rank_of(lengths)), device=device)
    together = len(scans) if views.is_cuda else max(1, _CACHED_VALUES // views[0].numel())
    for start in range(0, len(scans), together):
        part = views[start : start + together]
        for place, scan in zip(part, scans[start : start + together], strict=True):
            place.copy_(draw(scan, config, split(placing), device=device))
        _augment_(part, config, shading)
        part.sub_(_MEAN).div_(_STD)
    return views


def whole(values: NDArray[np.float32], size: Sequence[int]) -> Tensor:
    """All of a prepared scan, values (C, *S) in [0, 1], as the model takes it: (C, *size).

    Nothing random, for embedding and probing. The sides' ratio is not kept, as in the views of training.
    """
    return standardise(resize(torch.from_numpy(values)[None], size))[0]


def standardise(views: Tensor) -> Tensor:
    """[0, 1] -> [-2, 2], the range that the model takes: (x - 0.5) / 0.25."""
    return (views - _MEAN) / _STD


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
    scan: Croppable, config: ViewConfig, generator: torch.Generator, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Random resized crops of one scan, some of them mirrored: (V, C, *S) in [0, 1].

    Random resized crops: Inception (arXiv:1409.4842), as used by DINO and UniMiSS. A crop larger than the scan is cut
    to it, where torchvision would draw again.
    """
    lengths = scan.shape[1:]
    rank = rank_of(lengths)
    size = config.size_of(rank)
    region = _region(lengths, size, config.volume_region if rank == 3 else None, _uniform(rank, generator=generator))
    views = []
    for shares in _uniform(config.views, 2 + 2 * rank, generator=generator):
        crop = _read(scan, _crop(region, size, config, shares[: 2 + rank]), device)
        mirrored = [
            axis + 2
            for axis, (share, chance) in enumerate(zip(shares[2 + rank :], config.flip[-rank:], strict=True))
            if share < chance
        ]
        view = resize(crop, size)
        views.append(view.flip(mirrored) if mirrored else view)
    return torch.cat(views)


def rank_of(lengths: Sequence[int]) -> Rank:
    """2 or 3, from the lengths of the spatial axes. Raises ValueError: neither."""
    if len(lengths) == 2:
        return 2
    if len(lengths) == 3:
        return 3
    raise ValueError(f"expected (H, W) or (D, H, W), got {tuple(lengths)}")


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """x (N, C, *S) on a grid of `size`, linearly; where it shrinks, averaged over what falls between (no aliasing).

    Pillow's bilinear filter, axis by axis: the depth of a volume first, then the plane.
    """
    *depth, height, width = x.shape[2:]
    if depth and depth[0] != size[0]:
        # As a product with the filter's own matrix: several times faster than interpolating along a leading axis.
        points = torch.eye(depth[0], device=x.device)[None, None]
        matrix = F.interpolate(points, size=(size[0], depth[0]), mode="bilinear", antialias=True)[0, 0]
        x = torch.matmul(matrix, x.flatten(3)).unflatten(3, (height, width))
    if (height, width) != tuple(size[-2:]):
        planes = F.interpolate(x.flatten(1, -3), size=tuple(size[-2:]), mode="bilinear", antialias=True)
        x = planes.unflatten(1, x.shape[1:-2])
    return x


def _read(scan: Croppable, box: Box, device: torch.device | str) -> Tensor:
    return torch.from_numpy(scan.crop(box)).to(device)[None]


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


# ------------------------------------------------------------------------------------------------------- intensities


def augment(views: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Blur, noise, brightness, contrast and gamma, in this order, each with its chance and its strength for each view.

    views: (B, V, C, *S) in [0, 1], and so is the result. The five are nnU-Net's (Isensee et al. 2021, supplement),
    which UniMiSS uses through batchgenerators; clipping to [0, 1] stands for their `preserve_range`.
    """
    shaded = views.clone()
    _augment_(shaded, config, generator)
    return shaded


def _augment_(views: Tensor, config: ViewConfig, generator: torch.Generator) -> None:
    generators = [split(generator) for _ in range(len(views))]
    strengths = _strengths(torch.cat([torch.rand(views.shape[1], 2, 5, generator=each) for each in generators]), config)
    blur_sigma, noise_sigma, brightness, contrast, gamma = strengths.unbind(1)  # each (B*V,)
    x = views.flatten(0, 1)
    _blur_(x, blur_sigma)
    _add_noise_(x, noise_sigma, [each for each in generators for _ in range(views.shape[1])])
    _shade_(x, brightness, contrast)
    _apply_gamma_(x, gamma)


def _strengths(shares: Tensor, config: ViewConfig) -> Tensor:
    """(N, 5) strengths of blur, noise, brightness, contrast and gamma, each 0 or 1, which do nothing, by chance.

    shares: (N, 2, 5) in [0, 1), whether each happens and how strongly.
    """
    table: tuple[tuple[float, Interval, float], ...] = (
        (config.blur, config.blur_sigma, 0.0),
        (config.noise, config.noise_sigma, 0.0),
        (config.brightness, config.brightness_factor, 1.0),
        (config.contrast, config.contrast_factor, 1.0),
        (config.gamma, config.gamma_exponent, 1.0),
    )
    chance, low, high, nothing = torch.tensor([(chance, *interval, nothing) for chance, interval, nothing in table]).T
    happens, how = shares.unbind(1)
    return torch.where(happens < chance, low + how * (high - low), nothing)


def _blur_(x: Tensor, sigma: Tensor) -> None:
    """Gaussian blur along every spatial axis, in place where sigma > 0. x: (N, C, *S); sigma: (N,) in pixels.

    Separable, as one small matrix for each view and axis: fast on CPU and GPU, and each view has a width of its own.
    """
    chosen = sigma.nonzero().flatten()
    if not len(chosen):
        return
    index, widths = chosen.to(x.device), sigma[chosen].to(x.device)
    matrices = {length: blur_matrix(widths, length) for length in set(x.shape[2:])}
    blurred = x[index]
    for axis in range(2, x.ndim):
        blurred = _along(blurred, matrices[x.shape[axis]], axis)
    x[index] = blurred


def _along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """x (N, C, *S) with matrix (N, n, n) applied along `axis`."""
    if axis == x.ndim - 1:
        return torch.bmm(x.flatten(1, -2), matrix.mT).reshape(x.shape)
    rows = x.flatten(axis + 1)  # (N, C, ..., n, rest)
    return torch.matmul(matrix.reshape(len(x), *[1] * (axis - 1), *matrix.shape[1:]), rows).reshape(x.shape)


def blur_matrix(sigma: Tensor, length: int) -> Tensor:
    """(N, length, length): row i holds the weights of a Gaussian of `sigma` (N,) about i; rows sum to 1.

    Beyond an edge the signal is its mirror image, (d c b a | a b c d | d c b a), as in scipy.ndimage's `reflect`.
    """
    between = torch.arange(1 - length, 2 * length, device=sigma.device, dtype=sigma.dtype)  # distances that occur
    images = 2 * length * torch.arange(-2, 3, device=sigma.device, dtype=sigma.dtype)  # the mirror images' period
    weights = torch.exp(-(((between[:, None] + images) / sigma[:, None, None]) ** 2) / 2).sum(-1)  # (N, 3 length - 1)
    direct = weights[:, : 2 * length - 1].unfold(1, length, 1).flip(1)  # [i, j] holds distance j - i
    mirrored = weights[:, length:].unfold(1, length, 1)  # [i, j] holds distance i + j + 1
    matrix = direct + mirrored
    return matrix / matrix.sum(-1, keepdim=True)


def _add_noise_(x: Tensor, sigma: Tensor, generators: Sequence[torch.Generator]) -> None:
    """Gaussian noise, in place. sigma: (N,); generators: one for each of N, drawn from only where sigma > 0."""
    for index in sigma.nonzero().flatten().tolist():
        x[index] += sigma[index] * torch.randn(x.shape[1:], generator=generators[index]).to(x.device)


def _shade_(x: Tensor, brightness: Tensor, contrast: Tensor) -> None:
    """x -> brightness * x, then away from its mean by the factor `contrast`, then clipped to [0, 1], in place."""
    wide = (len(x), *[1] * (x.ndim - 1))
    factor = (brightness * contrast).to(x.device).view(wide)
    shift = (brightness * (1 - contrast)).to(x.device).view(wide)
    mean = x.mean(tuple(range(1, x.ndim)), keepdim=True)
    x.mul_(factor).add_(shift * mean).clamp_(0.0, 1.0)


def _apply_gamma_(x: Tensor, exponent: Tensor) -> None:
    """x -> x ** exponent, in place where it is not 1."""
    for index in (exponent != 1).nonzero().flatten().tolist():
        x[index].log2_().mul_(float(exponent[index])).exp2_()  # twice as fast as pow_, and 0 stays 0
