"""Radiographs made from volumes: what an X-ray tube and a detector would have seen of the same body.

Legend of shapes: N volumes, D, H, W their axes (to superior, posterior and left), S columns of the detector.

By Beer and Lambert's law a ray keeps the share exp(-mu_water * t) of its photons, where t, its *thickness*, is the
integral of the attenuation relative to water along it, in mm of water. A radiograph shows the logarithm of that share,
bone bright: t but for a factor, which its normalisation to [0, 1] takes out again, as it does the unknown length of a
view's voxels. So the exponential and its logarithm need not be computed.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unimiss_core.views import intensities, min_max, standardise


@dataclass(frozen=True, kw_only=True)
class Radiographer:
    """Takes one radiograph of each volume, by parallel rays of one energy and without scatter.

    size: (H, W) of the pictures; like all views they are brought to it whatever the ratio of their sides.
    ct_window_hu: what [0, 1] of a volume stands for. Of other modalities the same window makes a projection too: the
    anatomy of the volume, if not a picture that any detector would give.
    spacing_mm: of the volumes' H and W axes, which turning them needs to know.
    angle_deg: where the rays go. 0 is from front to back, 90 from right to left.
    """

    size: tuple[int, int]
    ct_window_hu: tuple[float, float]
    spacing_mm: tuple[float, float] = (1.0, 1.0)
    angle_deg: float = 0.0

    @torch.no_grad()
    def __call__(self, volumes: Tensor) -> Tensor:
        """volumes (N, 1, D, H, W) -> radiographs (N, 1, *size), both as the model takes them.

        Each is normalised to its own extremes, as an image is to its percentiles when it is prepared: every pixel is
        a mean over a whole ray already, so that no single voxel can stretch the range.
        """
        relative = attenuation(intensities(volumes[:, 0]), self.ct_window_hu)
        picture = thickness_mm(relative, spacing_mm=self.spacing_mm, angle_deg=self.angle_deg)
        picture = picture.flip(1)[:, None]  # rows of a picture run downwards, slices upwards
        return standardise(min_max(F.interpolate(picture, self.size, mode="bilinear", antialias=True)))


def attenuation(values: Tensor, ct_window_hu: tuple[float, float]) -> Tensor:
    """Intensities in [0, 1] of a window in HU -> attenuation relative to water: 1 + HU / 1000, never below 0 (air)."""
    low, high = ct_window_hu
    return (1 + (low + (high - low) * values) / 1000).clamp(min=0)


def thickness_mm(relative: Tensor, *, spacing_mm: tuple[float, float], angle_deg: float = 0.0) -> Tensor:
    """Attenuation relative to water (N, D, H, W) -> thickness of water that each ray meets, in mm: (N, D, S).

    spacing_mm: of H and W. angle_deg: as in `Radiographer`; around the volume there is air. The detector is as wide as
    the volume's shadow. At 0 its columns are those of W, at 90 those of H, from back to front.
    """
    if angle_deg == 0:
        return relative.sum(2) * spacing_mm[0]
    sine, cosine = math.sin(math.radians(angle_deg)), math.cos(math.radians(angle_deg))
    lengths = [n * spacing for n, spacing in zip(relative.shape[2:], spacing_mm, strict=True)]
    step = spacing_mm[0] * cosine**2 + spacing_mm[1] * sine**2
    pitch = spacing_mm[0] * sine**2 + spacing_mm[1] * cosine**2
    along = _centred((lengths[0] * abs(cosine) + lengths[1] * abs(sine)) / step, step, relative)[:, None]
    across = _centred((lengths[0] * abs(sine) + lengths[1] * abs(cosine)) / pitch, pitch, relative)
    h, w = along * cosine - across * sine, along * sine + across * cosine  # mm from the volume's axis
    grid = torch.stack([w * (2 / lengths[1]), h * (2 / lengths[0])], dim=-1)  # its edges lie at -1 and 1
    turned = F.grid_sample(relative, grid.expand(len(relative), -1, -1, -1), align_corners=False)
    return turned.sum(2) * step


def _centred(count: float, spacing: float, like: Tensor) -> Tensor:
    """About `count` points, `spacing` apart and centred on 0, of the kind and device of `like`."""
    whole = round(count)
    return (torch.arange(whole, dtype=like.dtype, device=like.device) - (whole - 1) / 2) * spacing
