"""One image or volume as the program knows it, whatever file it came from.

Legend of shapes: C channels, S spatial axes - (H, W) for an image, (D, H, W) for a volume.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Modality = Literal["CT", "MR", "PT", "XR", "OT"]
"""What decides how intensities are normalised: CT is in HU; XR is any projection X-ray (CR, DX, RF, RG, MG)."""

Rank = Literal[2, 3]
"""Number of spatial axes: 2 for an image, 3 for a volume. Always `x.ndim - 2` of a batch."""

RANKS: tuple[Rank, Rank] = (2, 3)

SMALLEST: dict[Rank, tuple[int, ...]] = {2: (33, 33), 3: (13, 33, 33)}
"""S that every network needs at least. Below it a stage's grid of MiT is smaller than its reduction, or its last map is
one voxel and has no variance."""

AGREE = 0.1
"""Voxels by which corners of what lies on one grid may be apart: what rounding in headers does."""


@dataclass(frozen=True)
class Scan:
    """An image or a volume in physical values and canonical axes.

    voxels: (C, *S), float32; HU for CT, stored values after rescale otherwise. C is 1 for grey.
        Of a volume the axes point to superior, posterior and the patient's left: an axial slice shows as a radiologist
        sees it. So does an image: an axial slice with posterior down, a coronal or sagittal one with inferior down,
        the patient's left or posterior to the right. An image without geometry is as it is stored.
    spacing_mm: distance between voxel centres along each of S.
    affine: (4, 4) from indices along S - (d, h, w), or (0, h, w) for an image - to patient millimetres in RAS+;
        None where the source has no geometry (PNG).
    """

    voxels: NDArray[np.float32]
    spacing_mm: tuple[float, ...]
    modality: Modality
    affine: NDArray[np.float64] | None = None
    spacing_known: bool = True
    """False where the source states no spacing (PNG): spacing_mm is then 1 for each pixel."""
    place_known: bool = True
    """False where the affine is assumed (NIfTI without qform and sform): in the patient the scan may lie anywhere."""
    is_calibrated: bool = True
    """False of a picture (PNG): its grey values were made to be looked at, and those of a CT are no HU."""

    def __post_init__(self) -> None:
        if self.voxels.ndim - 1 != len(self.spacing_mm):
            raise AssertionError(f"voxels {self.voxels.shape} do not go with spacing {self.spacing_mm}")

    @property
    def rank(self) -> Rank:
        return 2 if self.voxels.ndim == 3 else 3

    def apart_mm(self, affine: NDArray[np.float64]) -> float:
        """Largest distance between a corner of the scan by its own affine, which it must have, and by another."""
        assert self.affine is not None
        lengths = self.voxels.shape[1:] if self.rank == 3 else (1, *self.voxels.shape[1:])
        corners = np.array([[*corner, 1] for corner in product(*((0, length - 1) for length in lengths))])
        return float(np.linalg.norm(corners @ (self.affine - affine).T, axis=1).max())
