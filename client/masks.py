"""Masks as files that lie where their scans do: NIfTI on the grid of the scan's own file, PNG where there is none."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client import nifti, pictures


def write_at_source(
    folder: Path, name: str, classes: NDArray[np.uint8], affine: NDArray[np.float64] | None, source: Path
) -> Path:
    """Write classes (*S), in canonical axes with their affine, as `name` below `folder`, which is made; where it lies.

    source: the scan's file, or folder. Of NIfTI the mask has that file's shape, order of axes and affine.
    """
    folder.mkdir(exist_ok=True)
    if affine is None:
        path = folder / f"{name}.png"
        pictures.write_png(path, classes)
        return path
    path = folder / f"{name}.nii.gz"
    nifti.write_mask(path, classes, affine, source if source.is_file() and _is_nifti(source) else None)
    return path


def _is_nifti(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(348)
    return start[128:132] != b"DICM" and nifti.looks_like_nifti(start)
