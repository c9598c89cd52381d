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
from typing import Protocol

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
    views = torch.stack([draw(scan, config, split(placing), device=device) for scan in scans])
    return standardise(augment(views, config, shading))


def whole(scan: Croppable, size: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """All of the scan, resized to `size` and standardised: (1, C, *size). Nothing random: for embedding and probing."""
    everything = tuple(slice(0, length) for length in scan.shape[1:])
    return standardise(resize(_read(scan, everything, device), size))


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
    chances = config.flip[-rank:]
    region = _region(lengths, size, config.volume_region if rank == 3 else None, generator)
    views = []
    for _ in range(config.views):
        crop = _read(scan, _crop(region, size, config, generator), device)
        flips = (torch.rand(rank, generator=generator) < torch.tensor(chances)).nonzero().flatten()
        views.append(resize(crop, size).flip((flips + 2).tolist()))
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

    Pillow's bilinear filter, axis by axis: the plane first, then the depth of a volume.
    """
    n, c, *old = x.shape
    plane = tuple(size[-2:])
    if tuple(old[-2:]) != plane:
        x = F.interpolate(x.reshape(n, -1, *old[-2:]), size=plane, mode="bilinear", antialias=True)
        x = x.reshape(n, c, *old[:-2], *plane)
    if len(old) == 3 and old[0] != size[0]:
        columns = (size[0], plane[0] * plane[1])
        x = F.interpolate(x.flatten(3), size=columns, mode="bilinear", antialias=True).unflatten(3, plane)
    return x


def _read(scan: Croppable, box: Box, device: torch.device | str) -> Tensor:
    return torch.from_numpy(scan.crop(box)).to(device)[None]


def _region(lengths: Sequence[int], size: Sequence[int], scale: float | None, generator: torch.Generator) -> Box:
    """Where all views of one scan lie: a random box of `scale` times the view's size, within the scan."""
    if scale is None:
        return tuple(slice(0, length) for length in lengths)
    wanted = [scale * length for length in size]
    return _place([slice(0, length) for length in lengths], wanted, generator)


def _crop(region: Box, size: Sequence[int], config: ViewConfig, generator: torch.Generator) -> Box:
    """A random box in `region` that becomes one view of `size`."""
    share, stretch = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    area = _between(config.area, share)
    aspect = math.exp(_between((math.log(config.aspect[0]), math.log(config.aspect[1])), stretch)) * size[-2] / size[-1]
    *depth, height, width = (side.stop - side.start for side in region)
    surface = area * height * width
    wanted = [math.sqrt(area) * depth[0]] if depth else []
    return _place(region, [*wanted, math.sqrt(surface * aspect), math.sqrt(surface / aspect)], generator)


def _place(within: Sequence[slice], wanted: Sequence[float], generator: torch.Generator) -> Box:
    """A box of about the `wanted` lengths, anywhere in `within` with equal chance."""
    where = torch.rand(len(within), generator=generator, dtype=torch.float64).tolist()
    box = []
    for side, length, share in zip(within, wanted, where, strict=True):
        room = side.stop - side.start
        taken = min(room, max(1, round(length)))
        start = side.start + int(share * (room - taken + 1))
        box.append(slice(start, start + taken))
    return tuple(box)


def _between(interval: Interval, share: float) -> float:
    low, high = interval
    return low + share * (high - low)


# ------------------------------------------------------------------------------------------------------- intensities


def augment(views: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Blur, noise, brightness, contrast and gamma, in this order, each with its chance and its strength for each view.

    views: (B, V, C, *S) in [0, 1], and so is the result. The five are nnU-Net's (Isensee et al. 2021, supplement),
    which UniMiSS uses through batchgenerators; clipping to [0, 1] stands for their `preserve_range`.
    """
    generators = [split(generator) for _ in range(len(views))]
    strengths = torch.cat([_strengths(views.shape[1], config, each) for each in generators]).unbind(1)
    blur_sigma, noise_sigma, brightness, contrast, gamma = strengths  # each (B*V,)
    x = views.flatten(0, 1).clone()
    _blur_(x, blur_sigma)
    _add_noise_(x, noise_sigma, [each for each in generators for _ in range(views.shape[1])])
    _shade_(x, brightness, contrast)
    _apply_gamma_(x, gamma)
    return x.view_as(views)


def _strengths(count: int, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """(count, 5) strengths of blur, noise, brightness, contrast and gamma; 0 or 1, which do nothing, by chance."""
    table: tuple[tuple[float, Interval, float], ...] = (
        (config.blur, config.blur_sigma, 0.0),
        (config.noise, config.noise_sigma, 0.0),
        (config.brightness, config.brightness_factor, 1.0),
        (config.contrast, config.contrast_factor, 1.0),
        (config.gamma, config.gamma_exponent, 1.0),
    )
    chance = torch.tensor([row[0] for row in table])
    low, high = torch.tensor([row[1] for row in table]).T
    nothing = torch.tensor([row[2] for row in table])
    happens, share = torch.rand(2, count, len(table), generator=generator)
    return torch.where(happens < chance, low + share * (high - low), nothing)


def _blur_(x: Tensor, sigma: Tensor) -> None:
    """Gaussian blur along every spatial axis, in place where sigma > 0. x: (N, C, *S); sigma: (N,) in pixels.

    Separable, as one small matrix for each view and axis: fast on CPU and GPU, and each view has a width of its own.
    """
    chosen = sigma.nonzero().flatten()
    if not len(chosen):
        return
    index = chosen.to(x.device)
    blurred = x[index]
    for axis in range(2, x.ndim):
        matrix = blur_matrix(sigma[chosen].to(x.device), x.shape[axis])
        blurred = _along(blurred, matrix, axis)
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
        x[index].pow_(float(exponent[index]))
