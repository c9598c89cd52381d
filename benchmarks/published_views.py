"""UniMiSS's loader as it was released, restated operation by operation: what `benchmarks.views` measures against.

    published_volume(path, rng), published_image(path, rng)  ->  two views of one file

Nothing is left out, and nothing is made faster or slower than it is there: the same precision at each place, the same
loops over slices, the same chances (the first view has `_FIRST`, the second `_SECOND`). Sources: UniMiSS (ECCV 2022)
`data_loader3D.py` and `data_loader2D.py`; what they call in nibabel, OpenCV, batchgenerators 0.25 and torchvision is
written out here, so that the benchmark needs none of the last three. Stand-ins: torch resizes where OpenCV does
(bilinear, float64, 16 planes at once: 0.43 ms against 0.31 ms), Pillow decodes PNG where OpenCV does (5.9 ms against
5.1 ms).

Legend of shapes: D slices, (H, W) a slice. batchgenerators takes the first axis of (D, H, W) for channels, so that
"per channel" means per slice.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy import ndimage
from torch import Tensor

VOLUME = (16, 96, 96)
IMAGE = (224, 224)
_BLUR_SIGMA = (0.1, 2.0)
_BLUR_TAPS = 23

Array = NDArray[Any]


class _Chances(NamedTuple):
    """How often a view is changed; of the changes with a second chance, how often each of its slices is."""

    blur_of_slice: float
    brightness: float
    offset: float
    gamma: float
    grey: float
    image_blur: float


_FIRST = _Chances(blur_of_slice=0.8, brightness=0.8, offset=0.8, gamma=0.8, grey=0.8, image_blur=0.5)
_SECOND = _Chances(blur_of_slice=0.5, brightness=1.0, offset=0.5, gamma=1.0, grey=0.4, image_blur=1.0)

# ----------------------------------------------------------------------------------------------------------- volumes


def published_volume(path: Path, rng: np.random.Generator) -> list[Tensor]:
    """Two views (1, 16, 96, 96) float32 of a NIfTI file; float64 until both are resized."""
    volume = nibabel.load(path).get_fdata()  # type: ignore[attr-defined]
    missing = [max(0, side - length) for side, length in zip((256, 256, VOLUME[0]), volume.shape, strict=True)]
    volume = np.pad(volume, ((0, missing[0]), (0, missing[1]), (missing[2] // 2, missing[2] - missing[2] // 2)))
    volume = volume.transpose(2, 0, 1)
    sides = [_scaled(side, (1.4, 1.8), length, rng) for side, length in zip(VOLUME[1:], volume.shape[1:], strict=True)]
    region = _cut(volume, (len(volume), *sides), rng) / 1024.0
    views = []
    for chances in (_FIRST, _SECOND):
        view = _crop(region, rng).astype(np.float32).copy()
        views.append(torch.from_numpy(_augmented(view, chances, rng)[None]))
    return views


def _scaled(side: int, interval: tuple[float, float], length: int, rng: np.random.Generator) -> int:
    """`side` times a random factor; the side itself where that would not fit."""
    scaled = int(side * rng.uniform(*interval))
    return side if scaled >= length else scaled


def _cut(x: Array, shape: Sequence[int], rng: np.random.Generator) -> Array:
    """A random box of this shape; no copy."""
    starts = [int(rng.integers(0, have - want + 1)) for have, want in zip(x.shape, shape, strict=True)]
    return x[tuple(slice(start, start + want) for start, want in zip(starts, shape, strict=True))]


def _crop(region: Array, rng: np.random.Generator) -> Array:
    """A random box of 16 slices, 0.8 to 1.2 views wide, mirrored often, resized slice by slice to the view."""
    sides = [_scaled(side, (0.8, 1.2), length, rng) for side, length in zip(VOLUME[1:], region.shape[1:], strict=True)]
    crop = _cut(region, (VOLUME[0], *sides), rng)
    for axis in (2, 1, 0):
        if rng.uniform() < 0.8:
            crop = np.flip(crop, axis)
    return crop if tuple(sides) == VOLUME[1:] else _resized(crop)


def _resized(planes: Array) -> Array:
    """(D, h, w) -> (D, H, W), linear between neighbours, without regard to aliasing."""
    x = torch.from_numpy(np.ascontiguousarray(planes))[None]
    return np.asarray(F.interpolate(x, size=VOLUME[1:], mode="bilinear")[0].numpy())


def _augmented(x: Array, chances: _Chances, rng: np.random.Generator) -> Array:
    """batchgenerators' six transforms in UniMiSS's order, in place, each slice on its own. x: (D, H, W) float32."""
    deviation = rng.uniform(0, 0.1)
    for plane in x:
        plane[:] = plane + rng.normal(0.0, deviation, size=plane.shape)
    if rng.uniform() < 0.8:
        for plane in x:
            if rng.uniform() <= chances.blur_of_slice:
                plane[:] = ndimage.gaussian_filter(plane, rng.uniform(*_BLUR_SIGMA), order=0)
    if rng.uniform() < chances.brightness:
        for plane in x:
            plane *= rng.uniform(0.75, 1.25)
    if rng.uniform() < chances.offset:
        for plane in x:
            if rng.uniform() <= 0.8:
                plane += rng.normal(0.0, 0.4)
    for plane in x:
        _contrast(plane, rng)
    if rng.uniform() < chances.gamma:
        for plane in x:
            _gamma(plane, rng)
    return x


def _either_side(low: float, high: float, rng: np.random.Generator) -> float:
    """A factor below 1 as often as above."""
    return rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)


def _contrast(plane: Array, rng: np.random.Generator) -> None:
    """Stretched about the mean, the range kept."""
    factor, mean, low, high = _either_side(0.75, 1.25, rng), plane.mean(), plane.min(), plane.max()
    plane[:] = (plane - mean) * factor + mean
    plane[plane < low] = low
    plane[plane > high] = high


def _gamma(plane: Array, rng: np.random.Generator) -> None:
    """A power of the values brought to [0, 1]; mean and deviation kept."""
    mean, deviation = plane.mean(), plane.std()
    exponent, low = _either_side(0.7, 1.5, rng), plane.min()
    span = float(plane.max() - low + 1e-7)
    plane[:] = np.power((plane - low) / span, exponent) * span + low
    plane[:] = plane - plane.mean()
    plane[:] = plane / (plane.std() + 1e-8) * deviation
    plane[:] = plane + mean


# ------------------------------------------------------------------------------------------------------------ images


def published_image(path: Path, rng: np.random.Generator) -> list[Tensor]:
    """Two views (3, 224, 224) float32 in [0, 1] of a picture: torchvision's transforms of Pillow images."""
    with Image.open(path) as source:
        picture = source.convert("RGB")
    views = []
    for chances in (_FIRST, _SECOND):
        view = _random_resized_crop(picture, rng)
        if rng.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.8:
            view = _jittered(view, rng)
        if rng.random() < chances.grey:
            view = _grey(view)
        if rng.random() < chances.image_blur:
            view = _blurred(view, rng.uniform(*_BLUR_SIGMA))
        views.append(_tensor(view).float() / 255)
    return views


def _random_resized_crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """14 to 100% of the area, sides 3:4 to 4:3; ten tries to fit. Bicubic. A square in the middle if none does."""
    width, height = picture.size
    for _ in range(10):
        surface = width * height * rng.uniform(0.14, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(surface * aspect)), round(math.sqrt(surface / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            break
    else:
        w = h = min(width, height)
        left, top = (width - w) // 2, (height - h) // 2
    return picture.crop((left, top, left + w, top + h)).resize(IMAGE[::-1], Image.Resampling.BICUBIC)


def _jittered(view: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue, in a random order."""
    for change in rng.permutation(4):
        if change == 0:
            view = ImageEnhance.Brightness(view).enhance(rng.uniform(0.6, 1.4))
        elif change == 1:
            view = ImageEnhance.Contrast(view).enhance(rng.uniform(0.6, 1.4))
        elif change == 2:
            view = ImageEnhance.Color(view).enhance(rng.uniform(0.8, 1.2))
        else:
            view = _turned(view, rng.uniform(-0.1, 0.1))
    return view


def _turned(view: Image.Image, share: float) -> Image.Image:
    """The hue turned by `share` of the circle."""
    hue, saturation, value = view.convert("HSV").split()
    turned = Image.fromarray(np.array(hue) + np.int32(share * 255).astype(np.uint8))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _grey(view: Image.Image) -> Image.Image:
    grey = np.array(view.convert("L"), dtype=np.uint8)
    return Image.fromarray(np.dstack([grey, grey, grey]))


def _blurred(view: Image.Image, sigma: float) -> Image.Image:
    """A Gaussian of 23 x 23 taps, as one product of two axes; the edge mirrored."""
    place = torch.linspace(-(_BLUR_TAPS // 2), _BLUR_TAPS // 2, _BLUR_TAPS)
    weights = torch.exp(-0.5 * (place / sigma) ** 2)
    weights = weights / weights.sum()
    kernel = torch.mm(weights[:, None], weights[None, :]).expand(3, 1, _BLUR_TAPS, _BLUR_TAPS)
    padded = F.pad(_tensor(view)[None].float(), [_BLUR_TAPS // 2] * 4, mode="reflect")
    blurred = F.conv2d(padded, kernel, groups=3)[0].round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(blurred.permute(1, 2, 0).numpy()))


def _tensor(view: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()
