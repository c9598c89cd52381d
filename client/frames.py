"""Frames of DICOM files as their headers place them in the patient, and which of them make one volume.

N is a number of frames. Positions and directions are DICOM patient coordinates in mm (LPS).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unimiss_core.errors import ScanError

Vector = tuple[float, float, float]

MIN_SLICES = 3
"""Fewer frames at different positions are no volume."""
SPACING_TOLERANCE = 0.02
"""Two gaps are equal where they differ by less than this share of the smaller, or by 0.02 mm."""
_SAME_DIRECTION = 2e-3
_SAME_POSITION_MM = 1e-2
_SAME_STATION_PIXELS = 1.0
_MAX_PARTS = 1024
"""Orientations, or stations, in one series: an order more than the most that a scanner turns through."""


@dataclass(frozen=True)
class Plane:
    """Where a frame lies in the patient: centre of its first voxel, directions of length 1, steps in mm."""

    position: NDArray[np.float64]
    row: NDArray[np.float64]
    """Direction along a row: of rising column index."""
    column: NDArray[np.float64]
    spacing_mm: tuple[float, float]

    @property
    def normal(self) -> NDArray[np.float64]:
        normal = np.cross(self.row, self.column)
        return np.asarray(normal / np.linalg.norm(normal))


@dataclass(frozen=True)
class Frame:
    """One frame of one DICOM file, as its header describes it; no pixel has been read."""

    file: str
    """Path below the source's folder."""
    number: int
    """Index of the frame in its file, from 0."""
    position: Vector | None
    """Centre of the first voxel."""
    orientation: tuple[float, float, float, float, float, float] | None
    """Direction along a row, then down a column, as in ImageOrientationPatient."""
    spacing_mm: tuple[float, float] | None
    """(down the rows, along the columns), as in PixelSpacing."""
    contrast: tuple[str, ...] = ()
    """Echo, b-value, frame type: what tells volumes of one series apart that are all wanted."""
    time: tuple[float, ...] = ()
    """Temporal position, acquisition, instance: at one place, the smallest comes first."""
    acquisition: float = 0.0
    """Its number; 0 where none is said."""
    reason: str = ""
    """Why this frame is left out; empty where it is not."""

    @property
    def plane(self) -> Plane:
        """Of a frame whose geometry is known to be good (`_geometry_problem` found none)."""
        assert self.position is not None
        assert self.orientation is not None
        assert self.spacing_mm is not None
        row, column = np.array(self.orientation[:3]), np.array(self.orientation[3:])
        return Plane(np.array(self.position), row, column, self.spacing_mm)


def volumes_among(frames: Sequence[Frame]) -> Iterator[list[Frame]]:
    """Frames of one series, all with geometry -> those of each volume: of one orientation, contrast, station and
    acquisition. Raises ScanError as `_alike`."""
    for alike in _parallel(frames):
        for pile in _by_contrast(alike):
            for station in _stations(pile):
                yield from _acquisitions(station)


def _parallel(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Split by orientation and pixel spacing, each within a tolerance."""
    planes = [frame.plane for frame in frames]
    facts = np.array([np.concatenate([plane.row, plane.column, np.log(plane.spacing_mm)]) for plane in planes])
    return _alike(frames, facts, _SAME_DIRECTION)


def _alike(frames: Sequence[Frame], facts: NDArray[np.float64], tolerance: float) -> list[list[Frame]]:
    """Split by facts (N, F) of each frame, which goes to the first part whose first frame's differ by less than this.

    Raises ScanError(bad_geometry): more parts than any object has, which would take long to tell apart.
    """
    parts: list[list[Frame]] = []
    known = np.empty((_MAX_PARTS, *facts.shape[1:]))
    for frame, own in zip(frames, facts, strict=True):
        near = np.abs(known[: len(parts)] - own).max(axis=1, initial=0.0) < tolerance
        if near.any():
            parts[int(near.argmax())].append(frame)
        elif len(parts) < _MAX_PARTS:
            known[len(parts)] = own
            parts.append([frame])
        else:
            raise ScanError("bad_geometry", f"more than {_MAX_PARTS} orientations or stations")
    return parts


def _by_contrast(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Split by echo, b-value and frame type, unless each value stands for one frame only (then it says nothing)."""
    parts: dict[tuple[str, ...], list[Frame]] = {}
    for frame in frames:
        parts.setdefault(frame.contrast, []).append(frame)
    if len(parts) == len(frames):
        return [list(frames)] if frames else []
    return list(parts.values())


def _stations(frames: list[Frame]) -> list[list[Frame]]:
    """Split by place in the plane where frames of one height lie beside each other: legs, then pelvis, then chest, each
    a volume of its own. (A tilted gantry moves the heights of one volume, and all frames of a height alike.)"""
    if all(np.abs(pixels_aside(place)).max() < _SAME_STATION_PIXELS for place in by_place(frames)):
        return [frames]
    try:
        parts = _alike(frames, pixels_aside(frames), _SAME_STATION_PIXELS)
    except ScanError:  # no body has so many
        return [frames]
    return parts if len(parts) > 1 and all(len(by_place(part)) >= MIN_SLICES for part in parts) else [frames]


def _acquisitions(frames: list[Frame]) -> list[list[Frame]]:
    """Split by acquisition where several met some places and not all: a phase of the liver within one of the abdomen.
    Where all met every place they are time points of one volume; where none met a place twice, its parts."""
    parts: dict[float, list[Frame]] = {}
    for frame in frames:
        parts.setdefault(frame.acquisition, []).append(frame)
    places = {len(place) for place in by_place(frames)}
    if len(places) == 1 or not all(_is_whole(part) for part in parts.values()):
        return [frames]
    return list(parts.values())


def _is_whole(frames: list[Frame]) -> bool:
    """Whether these alone make a volume: each at a place of its own, evenly, none missing."""
    if len(frames) < MIN_SLICES or len(by_place(frames)) < len(frames):
        return False
    gaps = np.diff(np.sort(heights(frames)))
    return bool(close_to(gaps, float(np.median(gaps))).all())


def by_place(frames: list[Frame]) -> list[list[Frame]]:
    """Frames along the normal, those at one place together, in time order."""
    at = heights(frames)
    places: list[list[Frame]] = []
    bottom = -np.inf
    for index in np.argsort(at, kind="stable"):
        if at[index] - bottom < _SAME_POSITION_MM:
            places[-1].append(frames[index])
        else:
            places.append([frames[index]])
            bottom = at[index]
    return [sorted(place, key=lambda frame: (frame.time, frame.file, frame.number)) for place in places]


def heights(frames: Sequence[Frame]) -> NDArray[np.float64]:
    """(N,) position of each frame along the normal of the first, in mm."""
    return np.array([frame.position for frame in frames]) @ frames[0].plane.normal


def pixels_aside(frames: Sequence[Frame]) -> NDArray[np.float64]:
    """(N, 2): how far each frame lies off the first in its own plane, in pixels (rows, columns)."""
    plane = frames[0].plane
    off = np.array([frame.position for frame in frames]) - plane.position
    return np.stack([off @ plane.column / plane.spacing_mm[0], off @ plane.row / plane.spacing_mm[1]], axis=1)


def close_to(gaps: NDArray[np.float64], gap: float | NDArray[np.float64]) -> NDArray[np.bool_]:
    smaller = np.minimum(np.abs(gaps), np.abs(gap))
    return np.asarray(np.abs(gaps - gap) <= np.maximum(0.02, SPACING_TOLERANCE * smaller))
