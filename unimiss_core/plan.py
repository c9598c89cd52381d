"""The preprocessing plan: `Scan` -> array in [0, 1] that views are cut from.

The same plan is applied for pretraining and for fine-tuning; it travels in the checkpoint (`PlanConfig`).
Shapes: C channels, S spatial axes - (H, W) or (D, H, W).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from unimiss_core.errors import ScanError
from unimiss_core.scan import AGREE, Scan
from unimiss_core.study import PlanConfig
from unimiss_core.task_config import OtherGrids

_SAMPLED_VOXELS = 2**22
"""Percentiles of a larger scan are taken over every k-th voxel."""
_SAME_SPACING = 1e-3
"""As a share, of pictures whose headers round it."""
_LEAST_COVERED = 0.5
_HALFWAY = 1e-6
"""Old points: so near to the middle of two, a point lies between them but for rounding."""


def prepare(scan: Scan, plan: PlanConfig) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    """The scan as the model sees it: (C, *S) float32 in [0, 1], and its spacing in mm along S.

    Intensities first (a window in HU for CT, percentiles of the scan otherwise), so that metal and other extremes
    are clipped before they are averaged into their neighbours; then the grid.
    Raises ScanError: `blank` (nothing to see), `not_finite` (NaN or infinity in more than half of the voxels).
    """
    values = _finite(scan.voxels)
    in_hu = scan.modality == "CT" and scan.is_calibrated
    low, high = plan.ct_window_hu if in_hu else _bounds(values, plan.percentiles)
    values = ((np.clip(values, low, high) - low) / (high - low)).astype(np.float32)
    if np.ptp(values) < 1e-6:
        raise ScanError("blank")
    shape, spacing = target_grid(scan.voxels.shape[1:], scan.spacing_mm, plan, spacing_known=scan.spacing_known)
    steps = [new / old for new, old in zip(spacing, scan.spacing_mm, strict=True)]
    # The axes that lose most come first: what follows has less to do.
    for axis in sorted(range(len(steps)), key=lambda axis: -steps[axis]):
        values = resample(values, axis + 1, shape[axis], steps[axis])
    return np.clip(values, 0.0, 1.0), spacing


def prepare_channels(
    scans: Sequence[Scan], plan: PlanConfig, other_grids: OtherGrids = "refuse"
) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    """`prepare` of what one scan's channels are, each by its own kind and its own percentiles: (C, *S) on the grid of
    the first, and spacing in mm.

    other_grids: what becomes of one that does not lie on the first's grid. Raises ScanError: as `prepare`;
    `channels_apart` (they lie on different grids, or hardly meet).
    """
    first, *others = scans
    are_on_grid = [_is_on_grid_of(first, other) for other in others]
    if not all(are_on_grid) and (other_grids == "refuse" or not all(_says_where_it_lies(scan) for scan in scans)):
        raise ScanError("channels_apart")
    values, spacing = prepare(first, plan)
    found = [values]
    for other, is_on_grid in zip(others, are_on_grid, strict=True):
        if is_on_grid:  # but for rounding, which must not make its grid another
            as_first = replace(other, spacing_mm=first.spacing_mm, spacing_known=first.spacing_known)
            found.append(prepare(as_first, plan)[0])
        else:
            found.append(_laid_on(affine_of_prepared(first, values.shape[1:], spacing), values.shape[1:], other, plan))
    return np.concatenate(found) if others else values, spacing


def _is_on_grid_of(one: Scan, other: Scan) -> bool:
    if one.voxels.shape[1:] != other.voxels.shape[1:] or (one.affine is None) != (other.affine is None):
        return False
    if one.affine is not None and other.affine is not None:
        return one.apart_mm(other.affine) <= AGREE * min(one.spacing_mm)
    return np.allclose(one.spacing_mm, other.spacing_mm, rtol=_SAME_SPACING)


def _says_where_it_lies(scan: Scan) -> bool:
    return scan.affine is not None and scan.place_known and scan.rank == 3


def _laid_on(
    affine: NDArray[np.float64] | None, shape: tuple[int, ...], other: Scan, plan: PlanConfig
) -> NDArray[np.float32]:
    """(1, *shape) of another volume, prepared by itself and taken linearly between its points where a grid's lie, by
    what both affines say; 0 beyond its outermost voxels. Raises ScanError: it covers half of neither."""
    own, spacing = prepare(other, plan)
    own_affine = affine_of_prepared(other, own.shape[1:], spacing)
    assert affine is not None
    assert own_affine is not None
    to_own = np.linalg.inv(own_affine) @ affine  # indices of the grid -> indices of `own`
    lengths = torch.tensor(own.shape[:0:-1], dtype=torch.float32)  # torch's order of axes
    theta = torch.from_numpy(to_own[[2, 1, 0]][:, [2, 1, 0, 3]]).float()
    volume, within = torch.from_numpy(own)[None], 0
    taken = np.empty((1, *shape), dtype=np.float32)
    rows = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape[1:]), indexing="ij")[::-1], -1)
    for depth in range(shape[0]):  # one after the other, for the places are three volumes
        places = rows @ theta[:, :2].T + (depth * theta[:, 2] + theta[:, 3])
        is_within = ((places >= -0.5) & (places <= lengths - 0.5)).all(-1)
        grid = (2 * places + 1) / lengths - 1
        found = F.grid_sample(volume, grid[None, None], padding_mode="border", align_corners=False)
        taken[0, depth] = (found[0, 0, 0] * is_within).numpy()
        within += int(is_within.sum())
    covered = within / math.prod(shape)
    covered_of_own = within * abs(np.linalg.det(to_own[:3, :3])) / math.prod(own.shape[1:])
    if max(covered, covered_of_own) < _LEAST_COVERED:
        raise ScanError("channels_apart")
    return taken


def affine_of_prepared(scan: Scan, shape: Sequence[int], spacing_mm: Sequence[float]) -> NDArray[np.float64] | None:
    """Where a scan lies once `prepare` gave it this S and spacing, as its affine says it of its own grid; None where it
    has none."""
    if scan.affine is None:
        return None
    thin = [1.0] * (3 - len(shape))  # an image's affine begins with the axis that it has no extent along
    old, new = np.array([*thin, *scan.voxels.shape[1:]]), np.array([*thin, *shape])
    step = np.array([*thin, *(to / of for to, of in zip(spacing_mm, scan.spacing_mm, strict=True))])
    to_old = np.diag([*step, 1.0])
    to_old[:3, 3] = (old - 1) / 2 - step * (new - 1) / 2
    return np.asarray(scan.affine @ to_old)


def target_grid(
    shape: Sequence[int], spacing_mm: Sequence[float], plan: PlanConfig, *, spacing_known: bool = True
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(S, spacing in mm) of a prepared scan, from those of its source."""
    wanted: Sequence[float]
    if len(shape) == 3:
        wanted = plan.volume_spacing_mm
    else:
        wanted = (plan.image_spacing_mm if spacing_known else None) or spacing_mm
        longest = max(n * old / new for n, old, new in zip(shape, spacing_mm, wanted, strict=True))
        if plan.image_longest_side is not None and longest > plan.image_longest_side:
            wanted = [new * longest / plan.image_longest_side for new in wanted]
    grid = [max(1, round(n * old / new)) for n, old, new in zip(shape, spacing_mm, wanted, strict=True)]
    return tuple(grid), tuple(float(new) for new in wanted)


def resample(values: NDArray[np.float32], axis: int, length: int, step: float) -> NDArray[np.float32]:
    """Values on a new grid along `axis`: `length` points, `step` old points apart, about the same centre.

    Linear between neighbours; where the new grid is coarser, a triangle as wide as its step averages what lies in
    between (no aliasing). Beyond the ends the last value repeats.
    """
    old = values.shape[axis]
    if _is_same(old, length, step):
        return values
    centres = (np.arange(length) - (length - 1) / 2) * step + (old - 1) / 2  # in old points
    reach = max(1.0, step)
    first = np.floor(centres - reach).astype(int) + 1
    taps = first[:, None] + np.arange(math.ceil(2 * reach))  # (length, taps)
    weights = np.maximum(0.0, 1 - np.abs(taps - centres[:, None]) / reach)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    taps = taps.clip(0, old - 1)
    along = [1] * values.ndim
    along[axis] = length
    result = np.zeros([*values.shape[:axis], length, *values.shape[axis + 1 :]], dtype=np.float32)
    for tap in range(taps.shape[1]):
        result += np.take(values, taps[:, tap], axis) * weights[:, tap].reshape(along)
    return result


def resample_labels(labels: NDArray[np.uint8], shape: Sequence[int], steps: Sequence[float]) -> NDArray[np.uint8]:
    """Labels (*S) on the grid that `prepare` gives their scan: each point takes its nearest old one.

    Where points lie halfway between two, as at twice the spacing, they take the upper and the lower one in turns, like
    the fields of a chessboard: always the upper would move a mask by half an old point, and a vote, in which edges are
    ties, would take its rim away and thin things altogether. So a mask keeps its place and its volume, on average.
    steps: old points between two new ones along each axis, as in `resample`.
    """
    lower, upper = [], []
    for old, new, step in zip(labels.shape, shape, steps, strict=True):
        centres = (np.arange(new) - (new - 1) / 2) * step + (old - 1) / 2
        if _is_same(old, new, step):
            centres = np.arange(new)
        lower.append(np.ceil(centres - 0.5 - _HALFWAY).clip(0, old - 1).astype(int))
        upper.append(np.floor(centres + 0.5 + _HALFWAY).clip(0, old - 1).astype(int))
    is_dark = sum(np.ogrid[tuple(map(slice, shape))]) % 2 == 1
    return np.where(is_dark, labels[np.ix_(*upper)], labels[np.ix_(*lower)])


def _is_same(old: int, new: int, step: float) -> bool:
    """Whether a grid along one axis is to stay as it is."""
    return new == old and abs(step - 1) < 1e-3


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """NaN and infinities replaced by the lowest finite value: they stand for 'outside' in files that hold them."""
    finite = np.isfinite(values)
    if finite.all():
        return values
    if finite.mean() < 0.5:
        raise ScanError("not_finite")
    return np.where(finite, values, values[finite].min())


def _bounds(values: NDArray[np.float32], percentiles: tuple[float, float]) -> tuple[float, float]:
    """Values at the percentiles; the extremes where those coincide (a picture that is mostly background)."""
    sample = values.reshape(-1)[:: max(1, values.size // _SAMPLED_VOXELS)]
    low, high = (float(bound) for bound in np.percentile(sample, percentiles))
    if not low < high:
        low, high = float(values.min()), float(values.max())
    if not low < high:
        raise ScanError("blank")
    return low, high
