"""Labelled scans as a task's model takes them: read, laid beside their masks, prepared by the plan, kept on disk.

Legend of shapes: C channels, S spatial axes - (H, W) or (D, H, W).

What is kept (uint16 values and uint8 masks, mapped into memory) lies in the fine-tuning's folder only while it runs.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client import nifti, pictures, workers
from client.catalogue import safe_to_read_here
from client.channel_reading import modalities_of, read_channels, require_like_names
from client.finetune_config import FinetuneConfig, MedMnistData
from client.label_tables import PARTS, Case, LabelTable, Part
from client.medmnist import opened_arrays
from client.reasons import REASONS
from client.splits import Split, check_parts
from unimiss_core import progress
from unimiss_core.card_wording import on_one_line
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError
from unimiss_core.plan import prepare_channels, resample_labels
from unimiss_core.scan import AGREE, Modality, Scan
from unimiss_core.study import PlanConfig
from unimiss_core.task_config import SegmentationConfig

_FULL = 65535
_PLACES = 1000
"""Voxels of a class that are remembered of a scan, to lay training windows about."""
_WHITE = 255
"""What pictures of masks often hold in the place of 1."""
_SHOWN = 5


@dataclass(frozen=True)
class Grid:
    """Where a scan's values lay before it was prepared: to take a mask back there."""

    shape: tuple[int, ...]
    """S of the source, in canonical axes."""
    spacing_mm: tuple[float, ...]
    steps: tuple[float, ...]
    """Source voxels between two prepared ones, along each axis."""
    affine: NDArray[np.float64] | None
    spacing_known: bool = True
    """Whether `spacing_mm` are millimetres; of a picture without it, they are pixels."""


@dataclass(frozen=True)
class Labelled:
    """One prepared scan with its label."""

    case: Case
    values: NDArray[np.uint16]
    """(C, *S), mapped: value = stored / 65535, in [0, 1]."""
    grid: Grid
    mask: NDArray[np.uint8] | None = None
    """(*S), beside `values`; None of a classification."""
    reference: NDArray[np.uint8] | None = None
    """The mask on the source's own grid, which is what a result is measured by."""
    places: Mapping[int, NDArray[np.int32]] = field(default_factory=dict)
    """Class that is there -> (n, rank) indices of some of its voxels."""
    modalities: tuple[Modality, ...] = ("OT",)
    """As the scan was read, of each of its channels."""
    key: str = ""
    """`content_key` of `values`."""
    mask_key: str = ""
    """`content_key` of the mask on the source's own grid."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, *S)"""
        return self.values.shape

    def crop(self, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """Values in [0, 1] of a box along S: (C, *box)."""
        return as_values(self.values[(slice(None), *box)])

    def classes_in(self, box: tuple[slice, ...]) -> NDArray[np.uint8]:
        """Of a mask's box along S: (*box)."""
        assert self.mask is not None
        return self.mask[box]

    def whole(self) -> NDArray[np.float32]:
        """(C, *S) in [0, 1]."""
        return self.crop(tuple(slice(None) for _ in self.shape[1:]))


def as_stored(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Values in [0, 1] as they are kept, and as every model of a task sees them: of 16 bits."""
    return np.rint(values * _FULL).astype(np.uint16)


def as_values(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    """`as_stored` undone, up to rounding."""
    values = stored.astype(np.float32)
    values *= np.float32(1 / _FULL)
    return values


def grid_of(scan: Scan, spacing_mm: Sequence[float]) -> Grid:
    """Of a scan that was prepared to this spacing."""
    steps = tuple(new / old for new, old in zip(spacing_mm, scan.spacing_mm, strict=True))
    return Grid(scan.voxels.shape[1:], scan.spacing_mm, steps, scan.affine, scan.spacing_known)


class MaskError(Exception):
    """A scan does not fit its mask, or the task; the text says why, without a name or path."""


def prepare_cases(
    split: Split, table: LabelTable, plan: PlanConfig, config: FinetuneConfig, folder: Path, *, show_paths: bool = False
) -> dict[Part, list[Labelled]]:
    """Read and prepare the scans of every part into `folder`, which is made anew.

    A scan that cannot be read is left out, and a note says which lines; so is one that equals, to the last bit, another
    by which the model is judged: one person may stand there under two names. Raises ConfigError: masks that do not go
    with their scans, or hold nothing, all in one message; a class that no training mask holds. Raises
    NoUsableScanError.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def shown(case: Case) -> str:
        return f"line {case.number} ({case.file})" if show_paths else f"line {case.number}"

    unread: dict[str, list[str]] = {}
    wrong: list[str] = []
    parts: dict[Part, list[Labelled]] = {part: [] for part in split}
    total, done = sum(len(cases) for cases in split.values()), 0
    for part, cases in split.items():
        for case, scans, mask in read_cases(cases, table, config, plan):
            done += 1
            progress.report(progress.Preparing(config.name, done, total))
            if isinstance(scans, ScanError):
                unread.setdefault(scans.reason, []).append(shown(case))
                continue
            try:
                parts[part].append(_prepared(case, scans, mask, plan, config, folder, keeps_reference=part == "test"))
            except ScanError as error:
                unread.setdefault(error.reason, []).append(shown(case))
            except MemoryError:
                unread.setdefault("out_of_memory", []).append(shown(case))
            except MaskError as error:
                wrong.append(f"{shown(case)}: {error}")
    for reason, lines in unread.items():
        told = ", ".join(lines[:_SHOWN]) + (" and others" if len(lines) > _SHOWN else "")
        progress.report(progress.Note(f"left out: {len(lines)} scan(s), {reason}: {REASONS[reason]} ({told})"))
    parts = _without_copies(parts, shown)
    _check(parts, wrong, config, show_paths=show_paths)
    return parts


def _without_copies(
    parts: Mapping[Part, Sequence[Labelled]], shown: Callable[[Case], str]
) -> dict[Part, list[Labelled]]:
    """Without scans that equal one of a part that judges them: no test scan trains or stops training, and no validation
    scan trains."""
    kept: dict[Part, list[Labelled]] = {part: [] for part in parts}
    judging: dict[str, Case] = {}
    copies: list[str] = []
    for part in reversed(PARTS):
        for one in parts[part]:
            if one.key in judging:
                copies.append(f"{shown(one.case)} is {shown(judging[one.key])}")
            else:
                kept[part].append(one)
        judging |= {one.key: one.case for one in kept[part]}
    if copies:
        told = ", ".join(copies[:_SHOWN]) + (" and others" if len(copies) > _SHOWN else "")
        progress.report(
            progress.Note(
                f"left out: {len(copies)} scan(s) that equal one of another part to the last bit, by which the model "
                f"is judged ({told})"
            )
        )
    return kept


def _check(
    parts: Mapping[Part, Sequence[Labelled]], wrong: Sequence[str], config: FinetuneConfig, *, show_paths: bool
) -> None:
    if wrong:
        of_masks = config.task.name == "segmentation"
        kind = "do not fit their masks or the task" if of_masks else "are not of the task's rank"
        way_out = "" if show_paths else "; --show-paths names the files"
        more = f"\n  - and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        listed = "\n  - ".join(wrong[:_SHOWN])
        raise ConfigError(f"data: {len(wrong)} labelled scan(s) {kind}{way_out}\n  - {listed}{more}")
    if not any(parts.values()):
        raise NoUsableScanError("data: none of the labelled scans can be used; the notes above say why")
    check_parts({part: tuple(one.case for one in found) for part, found in parts.items()}, config)
    if isinstance(config.task, SegmentationConfig):
        held = Counter(number for one in parts["train"] for number in one.places)
        if lacking := [name for number, name in enumerate(config.task.classes, start=1) if not held[number]]:
            raise ConfigError(
                f"task.classes: no training mask holds {', '.join(lacking)}; value i of a mask is the i-th class. "
                "If few patients have it, take another fold or seed of the split, or leave it out of `classes`"
            )


# ----------------------------------------------------------------------------------------------------------- reading

Scans = tuple[Scan, ...]
"""What one scan is made of: one image or volume, or that of each of the task's channels."""
Read = tuple[Case, Scans | ScanError, "Scan | MaskError | None"]


def read_cases(cases: Sequence[Case], table: LabelTable, config: FinetuneConfig, plan: PlanConfig) -> Iterator[Read]:
    """Each case with what its scan is made of, and its mask where the task has them; or what was wrong with either.

    In their order. Where there is much to read, or codecs take part that may crash, a worker does it.
    """
    if isinstance(config.data, MedMnistData):
        yield from _of_arrays(cases, config.data.file, config, plan)
        return
    modalities, interpolate = modalities_of(config.task, table.modality), plan.interpolates
    pairs = [
        _Pair(
            scans=tuple(table.folder / file for file in case.files),
            mask=table.folder / case.mask if case.mask else None,
            numbers=table.channels,
            modalities=modalities,
            interpolate=interpolate,
        )
        for case in cases
    ]
    here = safe_to_read_here(path for pair in pairs for path in pair.paths)
    for index, outcome in workers.read_in_order(read_pair, pairs, here=here):
        yield cases[index], *((outcome, None) if isinstance(outcome, ScanError) else outcome)


@dataclass(frozen=True)
class _Pair:
    """A scan to be read, and its mask."""

    scans: tuple[Path, ...]
    """Of each channel."""
    mask: Path | None
    numbers: tuple[int, ...]
    modalities: tuple[Modality | None, ...]
    interpolate: bool

    @property
    def paths(self) -> tuple[Path, ...]:
        """As often as each is read: of several volumes once for each."""
        return (*self.scans, *((self.mask,) if self.mask is not None else ()))


def read_pair(pair: _Pair) -> tuple[Scans, Scan | MaskError | None]:
    """Raises ScanError: the scan cannot be read."""
    scans = read_channels(pair.scans, pair.numbers, pair.modalities, interpolate=pair.interpolate)
    return scans, None if pair.mask is None else mask_beside(pair.scans, pair.mask)


def mask_beside(scan: Sequence[Path], path: Path) -> Scan | MaskError:
    """`mask_at`, of the scan in these files or folders: one drawn on pixels as they are stored would lie wrong
    unseen."""
    mask = mask_at(path)
    if isinstance(mask, MaskError) or mask.affine is not None or pictures.is_stored_turned(path):
        return mask
    files = (file for one in scan for file in (one.rglob("*") if one.is_dir() else [one]))
    if any(map(pictures.is_stored_turned, files)):
        return MaskError("the picture is stored turned, and its mask does not say so; save both upright")
    return mask


def mask_at(path: Path) -> Scan | MaskError:
    try:
        with path.open("rb") as file:
            picture = pictures.looks_like_picture(file.read(8))
        return pictures.read_picture(path, "OT") if picture else nifti.read_nifti(path, "OT")
    except ScanError as error:
        return MaskError(f"the mask cannot be read ({error.reason}); give NIfTI, or 8-bit grey PNG or TIFF")
    except OSError:
        return MaskError("there is no such mask, or this user may not read it")


def _of_arrays(cases: Sequence[Case], file: Path, config: FinetuneConfig, plan: PlanConfig) -> Iterator[Read]:
    """Images of a MedMNIST file, whose spacing nobody knows: each counts as on the plan's own grid."""
    rank = config.task.rank
    spacing = plan.volume_spacing_mm if rank == 3 else (1.0, 1.0)
    with opened_arrays(file, f"data.file: {file.name}") as held:
        arrays: dict[str, NDArray[Any]] = {}
        for case in cases:
            assert case.place is not None
            name, row = case.place
            if name not in arrays:
                arrays[name] = held[name]
            if row >= len(arrays[name]):
                raise ConfigError(f"data.file: {name} holds {len(arrays[name])} images, fewer than there are labels")
            values = np.asarray(arrays[name][row], dtype=np.float32)
            coloured = values.ndim == rank + 1 and values.shape[-1] == 3 and rank == 2
            if values.ndim != rank and not coloured:
                raise ConfigError(f"task.rank: {rank}, but {name} holds arrays of shape {values.shape}")
            channels = np.moveaxis(values, -1, 0) if coloured else values[None]
            yield case, (Scan(channels, spacing, "OT", spacing_known=False),), None


# --------------------------------------------------------------------------------------------------------- preparing


def _prepared(
    case: Case,
    scans: Scans,
    mask: Scan | MaskError | None,
    plan: PlanConfig,
    config: FinetuneConfig,
    folder: Path,
    *,
    keeps_reference: bool,
) -> Labelled:
    """Raises ScanError: the scan cannot be used. Raises MaskError."""
    task, scan = config.task, scans[0]
    if other := next((one.rank for one in scans if one.rank != task.rank), None):
        kinds = {2: "an image (rank 2)", 3: "a volume (rank 3)"}
        raise MaskError(f"the scan is {kinds[other]}, expected {kinds[task.rank]}; correct task.rank, or leave it out")
    require_like_names(task, scans)
    values, spacing = prepare_channels(scans, plan, task.other_grids)
    stored = as_stored(values)
    kept = _kept(folder / f"{case.number:06d}.npy", stored)
    modalities = tuple(one.modality for one in scans)
    found = Labelled(case, kept, grid_of(scan, spacing), modalities=modalities, key=content_key(stored))
    if not isinstance(task, SegmentationConfig):
        return found
    if isinstance(mask, MaskError):
        raise mask
    assert mask is not None
    labels = labels_of(
        scan, mask, classes=len(task.classes), may_be_empty=config.allow_empty_masks, among=task.channels
    )
    beside = resample_labels(labels, values.shape[1:], found.grid.steps)
    return replace(
        found,
        mask=_kept(folder / f"{case.number:06d}-mask.npy", beside),
        mask_key=content_key(labels),
        reference=_kept(folder / f"{case.number:06d}-reference.npy", labels) if keeps_reference else None,
        places=places_in(beside),
    )


def labels_of(
    scan: Scan, mask: Scan, *, classes: int, may_be_empty: bool, among: Sequence[str] | None = None
) -> NDArray[np.uint8]:
    """The mask's classes (*S), 0 for background. among: names of the task's channels, the first of which the scan is.
    Raises MaskError: of another geometry, other values, or empty."""
    whose, way_out = "scan", ""
    if among is not None:
        whose = f"scan's first channel ({on_one_line(among[0])})"
        way_out = "; let task.channels begin with the one that masks were drawn on"
    if (scan.affine is None) != (mask.affine is None):
        which = "mask" if scan.affine is None else "scan"
        raise MaskError(
            f"the {which} alone says where it lies in the patient, so how one is turned against the other cannot be "
            "known; give a mask of the scan's own kind: NIfTI for NIfTI and for slices and volumes in DICOM, 8-bit "
            "grey PNG or TIFF for pictures and for X-rays in DICOM"
        )
    if mask.voxels.shape[1:] != scan.voxels.shape[1:]:
        raise MaskError(f"the {whose} has {scan.voxels.shape[1:]} voxels, its mask {mask.voxels.shape[1:]}{way_out}")
    if mask.affine is not None:
        apart = scan.apart_mm(mask.affine)
        if apart > AGREE * min(scan.spacing_mm):
            raise MaskError(
                f"{whose} and mask lie up to {apart:.1f} mm apart, as their affines say; resample the mask onto the "
                f"scan, or correct the header that is wrong{way_out}"
            )
    values = mask.voxels[0]
    there = np.unique(values)
    if classes == 1 and there.tolist() == [0, _WHITE]:  # a 2, say, would be another class than was asked for
        values, there = (values != 0).astype(np.float32), np.array([0, 1])
    if not (there == np.rint(there)).all() or there[0] < 0 or there[-1] > classes:
        raise MaskError(
            f"the mask holds values from {there[0]:g} to {there[-1]:g}; expected whole ones, 0 to {classes}"
        )
    if there[-1] == 0 and not may_be_empty:
        raise MaskError("the mask is empty; leave the scan out, or set allow_empty_masks: true")
    labels: NDArray[np.uint8] = values.astype(np.uint8)
    return labels


def content_key(array: NDArray[Any]) -> str:
    """sha256 of shape and values: equal scans have equal ones, whatever their files are called."""
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array).data)  # without a second copy of a large scan
    return digest.hexdigest()


def _kept(path: Path, array: NDArray[Any]) -> NDArray[Any]:
    """The array on disk, mapped."""
    try:
        np.save(path, array)
    except OSError as error:
        raise ConfigError(f"out: prepared scans cannot be written there ({error.strerror})") from None
    return np.asarray(np.load(path, mmap_mode="r"))


def places_in(mask: NDArray[np.integer[Any]]) -> dict[int, NDArray[np.int32]]:
    """Evenly chosen voxels of each class that is there."""
    found = {}
    for number in np.unique(mask[mask > 0]):
        where = np.argwhere(mask == number)
        found[int(number)] = where[:: -(-len(where) // _PLACES)].astype(np.int32)
    return found
