"""From sorted slices to a volume in canonical axes: assembly, gantry tilt, missing slices. Plain numpy.

Shapes: N frames of a stack, (H, W) rows and columns of a frame, (D, H, W) a volume. The affine of a finished scan is
in RAS+ mm, as `Scan` says.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.frames import Plane
from client.series import MAX_VOXELS, Stack
from unimiss_core.errors import ScanError
from unimiss_core.scan import Modality, Scan


def assemble(stack: Stack, pixels: NDArray[np.float32], modality: Modality) -> Scan:
    """The scan of `stack`, from its frames' values in order: (N, H, W) -> `Scan` in canonical axes."""
    first = stack.frames[0]
    if modality == "XR":
        spacing = first.spacing_mm or (1.0, 1.0)
        return Scan(pixels, spacing, modality, spacing_known=first.spacing_mm is not None)
    if stack.kind == "2d":
        return image_of(pixels[None], _affine(first.plane, 1.0), modality)
    affine = _affine(first.plane, stack.gap_mm)
    if stack.shifts:
        pixels, moved = straighten(pixels, stack.shifts)
        affine[:3, 3] += affine[:3, 1] * moved[0] + affine[:3, 2] * moved[1]
    if len(stack.slots) <= stack.slots[-1]:
        pixels = _fill_missing(pixels, stack.slots)
    voxels, affine = canonical(pixels[None], affine)
    return Scan(voxels, spacing_of(affine), modality, affine)


def _affine(plane: Plane, gap_mm: float) -> NDArray[np.float64]:
    """(4, 4) from (d, h, w) to RAS+ mm."""
    affine = np.eye(4)
    affine[:3, 0] = plane.normal * gap_mm
    affine[:3, 1] = plane.column * plane.spacing_mm[0]
    affine[:3, 2] = plane.row * plane.spacing_mm[1]
    affine[:3, 3] = plane.position
    affine[:2] *= -1  # LPS to RAS
    return affine


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, ...]:
    """Length in mm of one step along each index axis."""
    return tuple(float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))


def canonical(
    voxels: NDArray[np.float32], affine: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """(C, X, Y, Z) with its (4, 4) affine to RAS+ -> the same volume with axes nearest to (superior, posterior, left).

    Axes are only permuted and turned over: no value changes.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)  # columns: index axes in RAS
    wanted = np.array([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])  # rows: S, P, L
    agreement = wanted @ directions  # (wanted axis, index axis)
    best = max(itertools.permutations(range(3)), key=lambda order: sum(abs(agreement[i, order[i]]) for i in range(3)))
    reordered = affine[:, [*best, 3]].copy()
    voxels = voxels.transpose(0, *(axis + 1 for axis in best))
    for axis in range(3):
        if agreement[axis, best[axis]] < 0:
            voxels = _turned_over(voxels, reordered, axis)
    return np.ascontiguousarray(voxels), reordered


def _turned_over(voxels: NDArray[np.float32], affine: NDArray[np.float64], axis: int) -> NDArray[np.float32]:
    """(C, X, Y, Z) with the order along a spatial axis reversed; the affine is changed in place."""
    affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis + 1] - 1)
    affine[:3, axis] *= -1
    return np.flip(voxels, axis + 1)


def image_of(voxels: NDArray[np.float32], affine: NDArray[np.float64], modality: Modality) -> Scan:
    """(C, X, Y, Z), of which one axis has length 1, with its (4, 4) affine to RAS+ -> the image as it is shown.

    An axial slice has posterior down, any other the head up, however its rows and columns are stored.
    """
    turned, affine = canonical(voxels, affine)
    thin = turned.shape[1:].index(1)
    if thin > 0:
        turned = _turned_over(turned, affine, 0)
    kept = [axis for axis in range(3) if axis != thin]
    spacing = spacing_of(affine)
    image = np.ascontiguousarray(np.take(turned, 0, thin + 1))
    return Scan(image, tuple(spacing[axis] for axis in kept), modality, affine[:, [thin, *kept, 3]])


def straighten(
    pixels: NDArray[np.float32], shifts: Sequence[tuple[float, float]]
) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """Undo a gantry tilt: move each frame (H, W) in its plane to where it lies beside the first.

    pixels: (N, H, W). shifts: (rows, columns) of each frame against the first, in pixels. The canvas grows so that
    nothing is cut; what no frame covers takes the lowest value. Linear interpolation.
    Returns the frames on the new canvas, and the canvas' origin on the first frame's grid, in pixels.
    """
    offsets = np.array(shifts)
    low = np.floor(offsets.min(axis=0) + 1e-6)
    size = np.array(pixels.shape[1:]) + np.ceil(offsets.max(axis=0) - low - 1e-6).astype(int)
    if pixels.shape[0] * int(size.prod()) > MAX_VOXELS:
        raise ScanError("too_large")
    canvas = np.full((pixels.shape[0], *size), pixels.min(), dtype=np.float32)
    for frame, target, offset in zip(pixels, canvas, offsets - low, strict=True):
        whole = np.floor(offset + 1e-6).astype(int)
        part = np.maximum(offset - whole, 0.0)
        moved = _half_step(_half_step(frame, float(part[0]), 0), float(part[1]), 1)
        rows = slice(whole[0], min(whole[0] + moved.shape[0], size[0]))
        columns = slice(whole[1], min(whole[1] + moved.shape[1], size[1]))
        target[rows, columns] = moved[: rows.stop - rows.start, : columns.stop - columns.start]
    return canvas, (float(low[0]), float(low[1]))


def _half_step(frame: NDArray[np.float32], part: float, axis: int) -> NDArray[np.float32]:
    """Shift by `part` of a pixel (0 <= part < 1) towards higher indices; the edge repeats."""
    if part < 1e-3:
        return frame
    before = np.concatenate([np.take(frame, [0], axis), np.take(frame, range(frame.shape[axis] - 1), axis)], axis)
    return ((1 - part) * frame + part * before).astype(np.float32)


def _fill_missing(pixels: NDArray[np.float32], slots: Sequence[int]) -> NDArray[np.float32]:
    """(N, H, W) frames at `slots` -> (D, H, W), linear between neighbours."""
    volume = np.empty((slots[-1] + 1, *pixels.shape[1:]), dtype=np.float32)
    for index, (here, there) in enumerate(itertools.pairwise(slots)):
        for slot in range(here, there):
            share = (slot - here) / (there - here)
            volume[slot] = (1 - share) * pixels[index] + share * pixels[index + 1]
    volume[-1] = pixels[-1]
    return volume
