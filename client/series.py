"""From the headers of a folder's DICOM frames to volumes: grouping, sorting, geometry. No file is opened here.

Shapes: N frames of a stack, (H, W) rows and columns of a frame, (D, H, W) a volume. Positions and directions are
DICOM patient coordinates in mm (LPS); the affine of a finished scan is in RAS+, as `Scan` says.

Every frame that cannot be part of a scan is left out with a reason; the rules are listed in docs/reading.md.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from client.frames import MIN_SLICES, SPACING_TOLERANCE, Frame, by_place, close_to, heights, pixels_aside, volumes_among
from client.patients import Patient
from unimiss_core.errors import ScanError
from unimiss_core.scan import Modality

Kind = Literal["2d", "3d"]

MAX_INTERPOLATED = 0.1
"""At most this share of a finished volume's slices is made up between neighbours."""
MAX_SPACING_MM = 30.0
MIN_SPACING_MM = 0.01
MAX_VOXELS = 2**29
"""A larger scan is refused; 2**29 is 512 x 512 x 2048."""
_NO_VOLUME = frozenset(("missing_slices", "uneven_spacing", "uneven_offsets", "too_few_slices", "tilt_too_steep"))


@dataclass(frozen=True)
class Header:
    """One DICOM file without its pixels."""

    file: str
    patient: Patient | None
    study: str
    series: str
    instance: str
    modality: Modality | None
    matrix: tuple[int, int]
    frame_of_reference: str
    frames: tuple[Frame, ...]
    described: str = ""
    """What else its header says of its pixels: storage class, photometric interpretation, bits, scale."""
    compressed: bool = False
    reason: str = ""
    """Why the whole file is left out; empty where it is not."""


@dataclass(frozen=True)
class Stack:
    """A recipe for one scan: which frames, in which order, on which grid."""

    frames: tuple[Frame, ...]
    """Along the normal, from first to last slice; a single one for an image."""
    slots: tuple[int, ...]
    """The slice of the finished volume that each frame fills; slices without a frame are interpolated."""
    shifts: tuple[tuple[float, float], ...]
    """(rows, columns) by which each frame lies off the first, in pixels; empty where all lie straight."""
    matrix: tuple[int, int]
    gap_mm: float
    flags: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        return "2d" if len(self.frames) == 1 else "3d"

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        in_plane = self.frames[0].spacing_mm or (1.0, 1.0)
        return in_plane if self.kind == "2d" else (self.gap_mm, *in_plane)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix if self.kind == "2d" else (self.slots[-1] + 1, *self.matrix)


@dataclass(frozen=True)
class Group:
    """Frames that belong together, and what became of them: a stack to read, or a reason."""

    headers: tuple[Header, ...]
    frames: tuple[Frame, ...]
    stack: Stack | None
    reason: str


# ---------------------------------------------------------------------------------------------------------- grouping


def sort_out(headers: Iterable[Header], *, interpolate: bool) -> list[Group]:
    """Each scan and each left-out remainder of a folder.

    interpolate: whether a few missing slices may be made up between their neighbours.
    """
    groups: list[Group] = []
    series: dict[tuple[str, ...], list[Header]] = {}
    for header in headers:
        # Without a series UID a file is a series of its own.
        key = (header.study, header.series) if header.series else ("", "", header.file)
        series.setdefault(key, []).append(header)
    for members in series.values():
        groups += _sort_series(sorted(members, key=lambda header: header.file), interpolate=interpolate)
    return _without_slices_beside_volumes(groups)


def _sort_series(headers: list[Header], *, interpolate: bool) -> list[Group]:
    refused: dict[str, list[Header]] = {}
    usable: list[Header] = []
    copies = _copies(headers)
    for header in headers:
        reason = header.reason or _header_problem(header) or ("duplicate" if header.file in copies else "")
        if reason:
            refused.setdefault(reason, []).append(header)
        else:
            usable.append(header)
    groups = [Group(tuple(members), (), None, reason) for reason, members in refused.items()]
    if len({header.patient for header in usable}) > 1:
        # Whose scan it is cannot be known, so it is nobody's.
        return [*groups, Group(tuple(usable), (), None, "two_patients_in_series")]
    for members in _alike(usable):
        groups += _sort_alike(members, interpolate=interpolate)
    return _without_remnants(groups)


def _copies(headers: Sequence[Header]) -> set[str]:
    """Files that repeat another, which is kept: of archives that wrote a frame of reference of their own, those of the
    one that wrote most, for slices of several make no volume."""
    usable = [header for header in headers if header.instance and not (header.reason or _header_problem(header))]
    wrote = Counter(header.frame_of_reference for header in usable)
    first: dict[Header, str] = {}
    for header in sorted(usable, key=lambda one: (-wrote[one.frame_of_reference], one.frame_of_reference, one.file)):
        # Some anonymisers give every slice one and the same UID: a copy also has all else of the other.
        first.setdefault(_as_copied(header), header.file)
    return {header.file for header in usable} - set(first.values())


def _as_copied(header: Header) -> Header:
    """The header as of whatever file holds it, packed or not, and whatever its archive calls the frame of reference."""
    frames = tuple(replace(one, file="") for one in header.frames)
    return replace(header, file="", frame_of_reference="", compressed=False, frames=frames)


def _alike(headers: Sequence[Header]) -> list[list[Header]]:
    """Split by modality, matrix and frame of reference."""
    # Some anonymisers write a new frame of reference into every slice: then it says nothing.
    says_nothing = len(headers) > 1 and len({header.frame_of_reference for header in headers}) == len(headers)
    parts: dict[tuple[object, ...], list[Header]] = {}
    for header in headers:
        reference = "" if says_nothing else header.frame_of_reference
        parts.setdefault((header.modality, header.matrix, reference), []).append(header)
    return list(parts.values())


def _sort_alike(headers: list[Header], *, interpolate: bool) -> list[Group]:
    first, members = headers[0], tuple(headers)
    frames = [frame for header in headers for frame in header.frames]
    if first.modality == "XR":
        return [_image(header) for header in headers]
    groups = []
    refused: dict[str, list[Frame]] = {}
    usable: list[Frame] = []
    for frame in frames:
        reason = frame.reason or _geometry_problem(frame)
        if reason:
            refused.setdefault(reason, []).append(frame)
        else:
            usable.append(frame)
    groups += [Group(members, tuple(bad), None, reason) for reason, bad in refused.items()]
    try:
        for volume in volumes_among(usable):
            groups += _pile_up(members, volume, first.matrix, interpolate=interpolate)
    except ScanError as error:
        groups.append(Group(members, tuple(usable), None, error.reason))
    return groups


def _image(header: Header) -> Group:
    """A projection X-ray: each file is an image; films with several frames are cine or tomosynthesis."""
    frame, flags = header.frames[0], tuple[str, ...]()
    if len(header.frames) > 1:
        return Group((header,), header.frames, None, "multi_frame_xray")
    if frame.reason:
        return Group((header,), header.frames, None, frame.reason)
    if frame.spacing_mm is None or not _plausible(frame.spacing_mm):
        frame, flags = replace(frame, spacing_mm=None), ("spacing_unknown",)
    stack = Stack((frame,), slots=(0,), shifts=(), matrix=header.matrix, gap_mm=0.0, flags=flags)
    return Group((header,), header.frames, stack, "")


def _header_problem(header: Header) -> str:
    """What is wrong with a file of one frame, seen before it can count as the first of several copies."""
    if header.modality == "XR" or len(header.frames) != 1:
        return ""
    return header.frames[0].reason or _geometry_problem(header.frames[0])


def _geometry_problem(frame: Frame) -> str:
    if frame.spacing_mm is None or frame.position is None or frame.orientation is None:
        return "no_geometry"
    if not _plausible(frame.spacing_mm):
        return "bad_spacing"
    if not np.isfinite(frame.position).all() or max(map(abs, frame.position)) > 1e6:
        return "bad_geometry"
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not all(abs(length - 1) < 0.01 for length in lengths) or not abs(row @ column) < 0.01:
        return "bad_geometry"
    return ""


def _plausible(spacing_mm: Iterable[float]) -> bool:
    return all(MIN_SPACING_MM <= value <= MAX_SPACING_MM for value in spacing_mm)


# ---------------------------------------------------------------------------------------------------------- geometry


def _pile_up(
    headers: tuple[Header, ...], frames: list[Frame], matrix: tuple[int, int], *, interpolate: bool
) -> list[Group]:
    """Frames of one orientation and contrast -> volumes, extra time points, duplicates, refusals."""
    places = by_place(frames)
    chosen = [place[0] for place in places]
    rest = [frame for place in places for frame in place[1:]]
    groups = []
    flags: list[str] = []
    if rest:
        times = {len(place) for place in places}
        later = len(times) == 1
        groups.append(Group(headers, tuple(rest), None, "later_time_point" if later else "duplicate"))
        flags.append("first_of_several_times" if later else "duplicates_dropped")
    if len(chosen) == 1:
        stack = Stack(frames=(chosen[0],), slots=(0,), shifts=(), matrix=matrix, gap_mm=0.0, flags=tuple(flags))
        return [*groups, Group(headers, (chosen[0],), stack, "")]
    for run, slots in _even_runs(chosen, interpolate=interpolate):
        try:
            stack = _stack(run, slots, matrix)
            split = ["split_at_spacing_change"] if len(run) < len(chosen) else []
            stack = replace(stack, flags=(*flags, *split, *stack.flags))
            groups.append(Group(headers, tuple(run), stack, ""))
        except ScanError as error:
            groups.append(Group(headers, tuple(run), None, error.reason))
    return groups


def _even_runs(frames: list[Frame], *, interpolate: bool) -> list[tuple[list[Frame], list[int] | str]]:
    """Cut sorted frames into runs of one spacing: (frames, the slots they fill, or the reason of a refusal)."""
    gaps = np.diff(heights(frames))
    unit = float(np.median(gaps[close_to(gaps, _commonest(gaps))]))
    if len(frames) < MIN_SLICES:
        return [(frames, "too_few_slices")]
    steps = np.rint(gaps / unit).astype(int)
    off = np.abs(gaps - steps * unit)
    if (steps >= 1).all() and (off <= max(0.02, SPACING_TOLERANCE * unit)).all():
        return [(frames, _slots(steps, interpolate=interpolate))]
    runs: list[tuple[list[Frame], list[int] | str]] = []
    start = 0
    while start < len(frames):
        stop = start + 1
        while stop < len(frames) and close_to(gaps[stop - 1 : stop], gaps[start]).all():
            stop += 1
        run = frames[start:stop]
        # Where the gap that ends this run opens the next, the shared slice stays with this one.
        if len(run) >= MIN_SLICES:
            runs.append((run, list(range(len(run)))))
            start = stop
        else:
            runs.append((frames[start : start + 1], "uneven_spacing"))
            start += 1
    return _joined(runs)


def _joined(runs: list[tuple[list[Frame], list[int] | str]]) -> list[tuple[list[Frame], list[int] | str]]:
    """Refused frames of one series as one entry."""
    good = [run for run in runs if not isinstance(run[1], str)]
    bad = [frame for frames, slots in runs if isinstance(slots, str) for frame in frames]
    return [*good, (bad, "uneven_spacing")] if bad else good


def _commonest(gaps: NDArray[np.float64]) -> float:
    """The gap with the most others close to it; the smallest of equals."""
    ordered = np.sort(gaps)
    votes = _close_beside(ordered, 1) + _close_beside(ordered, -1)
    return float(ordered[int(np.argmax(votes))])


def _close_beside(ordered: NDArray[np.float64], side: Literal[1, -1]) -> NDArray[np.int_]:
    """(N,): how many of the gaps above (1) or below (-1) are close to each. They lie side by side, so their end is
    found by halving: a file may hold so many different gaps that each with each would take minutes."""
    places = np.arange(len(ordered))
    room = places[::-1] if side == 1 else places
    count = np.zeros_like(places)
    for bit in reversed(range(len(ordered).bit_length())):
        more = count + 2**bit
        fits = more <= room
        near = close_to(ordered[np.where(fits, places + side * more, places)], ordered)
        count = np.where(fits & near, more, count)
    return count


def _slots(steps: NDArray[np.int_], *, interpolate: bool) -> list[int] | str:
    slots = [0, *itertools.accumulate(int(step) for step in steps)]
    missing = slots[-1] + 1 - len(slots)
    if missing and not (interpolate and missing <= MAX_INTERPOLATED * (slots[-1] + 1)):
        return "missing_slices"
    return slots


def _stack(frames: list[Frame], slots: list[int] | str, matrix: tuple[int, int]) -> Stack:
    """The recipe of a volume. Raises ScanError where there is none."""
    if isinstance(slots, str):
        raise ScanError(slots)
    at = heights(frames)
    gap_mm = float(at[-1] - at[0]) / slots[-1]
    if not _plausible([gap_mm]):
        raise ScanError("bad_spacing", f"slices {gap_mm:.4g} mm apart")
    if (slots[-1] + 1) * matrix[0] * matrix[1] > MAX_VOXELS:
        raise ScanError("too_large")
    flags = ["missing_slices_interpolated"] if len(slots) <= slots[-1] else []
    shifts = _shifts(frames)
    if shifts:
        flags.append("gantry_tilt_corrected")
    return Stack(tuple(frames), tuple(slots), shifts, matrix, gap_mm, tuple(flags))


def _shifts(frames: list[Frame]) -> tuple[tuple[float, float], ...]:
    """How far each frame lies off the first in its own plane, in pixels (rows, columns).

    A tilted gantry makes it grow evenly from slice to slice. Raises ScanError(uneven_offsets) where it does not, and
    ScanError(tilt_too_steep) beyond 45 degrees.
    """
    plane, pixels = frames[0].plane, pixels_aside(frames)
    if np.abs(pixels).max() < 0.5:
        return ()
    along = heights(frames) - heights(frames[:1])
    even = np.outer(along / along[-1], pixels[-1])
    if np.abs(pixels - even).max() > 1.0:
        raise ScanError("uneven_offsets", "slices lie beside each other unevenly")
    if np.hypot(*(pixels[-1] * plane.spacing_mm)) > along[-1]:
        raise ScanError("tilt_too_steep", "more than 45 degrees")
    return tuple((float(rows), float(columns)) for rows, columns in even)


def _without_remnants(groups: list[Group]) -> list[Group]:
    """A lone slice of a series whose other slices make no volume is a piece of it, not an image of its own."""
    if not any(group.reason in _NO_VOLUME and group.headers[0].modality != "XR" for group in groups):
        return groups
    return [
        replace(group, stack=None, reason="lone_slice")
        if group.stack is not None and group.stack.kind == "2d"
        else group
        for group in groups
    ]


def _without_slices_beside_volumes(groups: list[Group]) -> list[Group]:
    """A lone CT or MR slice next to a volume of its patient and study is a test shot or bolus watch, not an image of
    its own. The patient counts, too: some anonymisers give one study UID to many."""
    studies = {
        (group.headers[0].patient, group.headers[0].study, group.headers[0].modality)
        for group in groups
        if group.stack is not None and group.stack.kind == "3d"
    }
    kept = []
    for group in groups:
        first = group.headers[0]
        lone = group.stack is not None and group.stack.kind == "2d" and first.modality != "XR"
        if lone and first.study and (first.patient, first.study, first.modality) in studies:
            group = replace(group, stack=None, reason="slice_beside_volume")
        kept.append(group)
    return kept
