"""`unimiss-site check`: a truthful account of a folder, before anything joins. It reads everything and sends nothing.

Every scan is decoded and prepared exactly as for training. The report names no patient and, unless the operator asks
for it, no path: patients are numbered in the order in which they are met. Its format is in docs/reading.md.
"""

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from client import nifti, pictures, workers
from client.cache import content_key
from client.candidates import Candidate, LeftOut
from client.catalogue import Catalogue, catalogue, read
from client.listing import oddities
from client.medmnist import who_takes
from client.reasons import FLAGS, REASONS
from client.series import Kind
from client.site_config import RANKS_BY_NAME, DataSource, PatientLimits
from unimiss_core.errors import ConfigError, ScanError
from unimiss_core.plan import affine_of_prepared, prepare
from unimiss_core.scan import RANKS, Modality, Rank, Scan
from unimiss_core.study import PlanConfig

FORMAT = 1
_TILE = 96
_MAX_TILES = 120
_PIXEL_REASONS = frozenset(
    (
        *("truncated_pixels", "cannot_decode", "needs_extra_jpeg12", "bad_pixel_description", "damaged_header"),
        *("timed_out", "reader_crashed", "reader_failed", "out_of_memory", "missing_file", "cannot_open"),
    )
)
"""A file with one of these could not be read; the others were read and left out by rule."""
_MODALITY_NAMES = {"CT": "CT", "MR": "MR", "PT": "PET", "XR": "X-ray", "OT": "other"}


@dataclass(frozen=True)
class Entry:
    """One image, volume or left-out remainder of a series."""

    kind: Kind
    modality: Modality | None
    shape: tuple[int, ...]
    """Of the source, in canonical axes where it was read: (H, W) or (D, H, W)."""
    spacing_mm: tuple[float, ...]
    paths: tuple[Path, ...]
    decision: Literal["used", "left_out"]
    reason: str = ""
    flags: tuple[str, ...] = ()
    patient: int | None = None
    study: int | None = None


@dataclass(frozen=True)
class CheckReport:
    entries: tuple[Entry, ...]
    files_seen: int
    unreadable: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """Reason -> files that could not be read."""
    odd: tuple[str, ...] = ()
    """What the data sources say that can hardly be meant."""

    @property
    def used(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.decision == "used")

    @property
    def ranks(self) -> frozenset[Rank]:
        """Of the scans in use."""
        return frozenset(rank for rank in RANKS if any(entry.kind == f"{rank}d" for entry in self.used))

    @property
    def unowned(self) -> int:
        """Scans in use of which nothing says whose they are."""
        return sum("patient_assumed" in entry.flags for entry in self.used)


def check(
    sources: Sequence[DataSource],
    plan: PlanConfig,
    *,
    by_patient: bool = False,
    processes: int | None = None,
    nifti_folder: Path | None = None,
    preview: Path | None = None,
    show: Callable[[str, int, int], None] | None = None,
) -> CheckReport:
    """Read everything in `sources` and say what would be used.

    by_patient: as for patient-level studies. nifti_folder: write each prepared scan there. preview: write a contact
    sheet (PNG) there. show: called with (what is going on, done, total or 0) as the work goes on.
    Raises ConfigError: what was asked for cannot be written.
    """
    show = show or (lambda _what, _done, _total: None)
    found = catalogue(
        sources,
        secrets.token_bytes(32),  # patients are told apart within this report, and never again
        interpolate=plan.interpolates,
        by_patient=by_patient,
        processes=processes,
        isolate=True,
        looked=lambda done: show("looking at files", done, 0),
    )
    tasks = [
        _Examine(candidate, plan, nifti_folder, f"scan-{number:05d}", preview is not None)
        for number, candidate in enumerate(found.candidates, start=1)
    ]
    outcomes: dict[int, _Examined | ScanError] = {}
    for index, outcome in workers.run(examine, tasks, workers=processes, time_limit_s=workers.READING_LIMIT_S):
        if isinstance(outcome, ScanError) and outcome.reason == "cannot_write":
            raise ConfigError(f"--save-nifti {nifti_folder}: cannot be written ({outcome.detail})")
        outcomes[index] = outcome
        show("reading scans", len(outcomes), len(tasks))
    if preview is not None:
        tiles = [one.tile for _, one in sorted(outcomes.items()) if isinstance(one, _Examined)]
        try:
            pictures.write_png(preview, contact_sheet([tile for tile in tiles if tile is not None]))
        except OSError as error:
            raise ConfigError(f"{preview}: cannot be written ({error.strerror})") from None
    return replace(_report(found, outcomes), odd=tuple(oddities(sources)))


@dataclass(frozen=True)
class _Examine:
    candidate: Candidate
    plan: PlanConfig
    nifti_folder: Path | None
    name: str
    preview: bool


@dataclass(frozen=True)
class _Examined:
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    key: str
    tile: NDArray[np.uint8] | None


def examine(task: _Examine) -> _Examined:
    """Read and prepare one scan, write what was asked for, keep only what the report needs."""
    scan = read(task.candidate)
    values, spacing = prepare(scan, task.plan)
    if task.nifti_folder is not None:
        prepared = Scan(values, spacing, scan.modality, affine_of_prepared(scan, values.shape[1:], spacing))
        try:
            nifti.write_nifti(task.nifti_folder / f"{task.name}_{scan.modality}_{scan.rank}d.nii.gz", prepared)
        except OSError as error:
            raise ScanError("cannot_write", error.strerror or "unknown error") from None
    return _Examined(
        shape=scan.voxels.shape[1:],
        spacing_mm=scan.spacing_mm,
        key=content_key(task.candidate, task.plan),
        tile=_tile(values) if task.preview else None,
    )


def _tile(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(_TILE, _TILE): the picture, or the middle axial slice, shrunk to fit."""
    picture = values[0] if values.ndim == 3 else values[0, values.shape[1] // 2]
    step = max(1.0, max(picture.shape) / _TILE)
    rows, columns = (np.arange(0, length, step).astype(int) for length in picture.shape)
    small = picture[np.ix_(rows[:_TILE], columns[:_TILE])]
    tile = np.zeros((_TILE, _TILE), dtype=np.uint8)
    top, left = (_TILE - small.shape[0]) // 2, (_TILE - small.shape[1]) // 2
    tile[top : top + small.shape[0], left : left + small.shape[1]] = np.rint(small * 255)
    return tile


def contact_sheet(tiles: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """All tiles, or so many evenly picked ones, on one sheet (H, W) with white lines between."""
    if len(tiles) > _MAX_TILES:
        tiles = [tiles[round(index)] for index in np.linspace(0, len(tiles) - 1, _MAX_TILES)]
    columns = min(12, max(1, len(tiles)))
    rows = max(1, -(-len(tiles) // columns))
    sheet = np.full((rows * (_TILE + 2) + 2, columns * (_TILE + 2) + 2), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = 2 + index // columns * (_TILE + 2), 2 + index % columns * (_TILE + 2)
        sheet[top : top + _TILE, left : left + _TILE] = tile
    return sheet


# ---------------------------------------------------------------------------------------------------------- report


def _report(found: Catalogue, outcomes: Mapping[int, _Examined | ScanError]) -> CheckReport:
    patients, studies = _Numbers(), _Numbers()
    entries: list[Entry] = []
    unreadable: dict[str, list[Path]] = {}
    seen: set[tuple[str, str]] = set()
    for index, candidate in enumerate(found.candidates):
        outcome = outcomes[index]
        reason = outcome.reason if isinstance(outcome, ScanError) else ""
        if isinstance(outcome, _Examined):
            reason = "duplicate" if (candidate.patient, outcome.key) in seen else ""
            seen.add((candidate.patient, outcome.key))
        if reason in _PIXEL_REASONS:  # one file of the series failed; which one, its reader does not say
            unreadable.setdefault(reason, []).append(candidate.paths[0])
        read_well = isinstance(outcome, _Examined)
        entries.append(
            Entry(
                kind=candidate.kind,
                modality=candidate.modality,
                shape=outcome.shape if isinstance(outcome, _Examined) else candidate.shape,
                spacing_mm=outcome.spacing_mm if isinstance(outcome, _Examined) else candidate.spacing_mm,
                paths=candidate.paths,
                decision="used" if read_well and not reason else "left_out",
                reason=reason,
                flags=candidate.flags,
                patient=patients.of(candidate.patient),
                study=studies.of(candidate.study),
            )
        )
    for entry in found.left_out:
        if entry.reason in _PIXEL_REASONS:
            unreadable.setdefault(entry.reason, []).extend(entry.paths)
        entries.append(_left_out_entry(entry, patients))
    for entry in found.unreadable:
        unreadable.setdefault(entry.reason, []).extend(entry.paths)
    return CheckReport(tuple(entries), found.files_seen, {key: tuple(unreadable[key]) for key in sorted(unreadable)})


def _left_out_entry(entry: LeftOut, patients: "_Numbers") -> Entry:
    return Entry(
        kind=entry.kind,
        modality=entry.modality,
        shape=entry.shape,
        spacing_mm=entry.spacing_mm,
        paths=entry.paths,
        decision="left_out",
        reason=entry.reason,
        patient=patients.of(entry.patient),
    )


class _Numbers:
    """Counts what it is asked for from 1, so that equal things can be told without saying what they are."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, key: str) -> int | None:
        return self._known.setdefault(key, len(self._known) + 1) if key else None


def as_json(report: CheckReport, *, show_paths: bool) -> dict[str, Any]:
    """The report as docs/reading.md describes it; paths only where the operator asked for them."""
    result: dict[str, Any] = {
        "format": FORMAT,
        "files_seen": report.files_seen,
        "files_unreadable": {reason: len(paths) for reason, paths in report.unreadable.items()},
        "patients": len({entry.patient for entry in report.used}),
        "used": {kind: sum(entry.kind == kind for entry in report.used) for kind in ("2d", "3d")},
        "series": [_entry_json(entry, show_paths=show_paths) for entry in report.entries],
    }
    if show_paths:
        result["unreadable_paths"] = {
            reason: [_shown(path) for path in paths] for reason, paths in report.unreadable.items()
        }
    return result


def _entry_json(entry: Entry, *, show_paths: bool) -> dict[str, Any]:
    result: dict[str, Any] = {
        "kind": entry.kind,
        "modality": entry.modality,
        "shape": list(entry.shape),
        "spacing_mm": [round(step, 6) for step in entry.spacing_mm],
        "files": len(entry.paths),
        "decision": entry.decision,
        "reason": entry.reason or None,
        "flags": list(entry.flags),
        "patient": entry.patient,
    }
    return result | ({"paths": [_shown(path) for path in entry.paths]} if show_paths else {})


def _shown(path: Path) -> str:
    """A path as text that can be printed, also where its name is not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def tables(report: CheckReport, *, show_paths: bool) -> Lines:
    """The report for a person: what would be used, what is left out and why, and what the operator could do."""
    unread = sum(len(paths) for paths in report.unreadable.values())
    patients = len({entry.patient for entry in report.used})
    said = f"{report.files_seen} files seen, {unread} of them no scans or not readable, {len(report.used)} scans usable"
    parts: list[Any] = [_used_table(report)] if report.used else []
    if report.unreadable or any(entry.reason for entry in report.entries):
        parts.append(_left_out_table(report))
    if any(entry.flags for entry in report.used):
        parts.append(_flags_table(report))
    parts += [Text(f"{said} (patients: {patients}). Nothing was sent."), *map(Text, (*report.odd, *_advice(report)))]
    if show_paths:
        lines = [(entry.reason, path) for entry in report.entries if entry.reason for path in entry.paths]
        lines += [(reason, path) for reason, paths in report.unreadable.items() for path in paths]
        parts += [Text(f"{reason}  {_shown(path)}") for reason, path in sorted(set(lines))]
    return Lines(*parts)


def _advice(report: CheckReport) -> Iterator[str]:
    if report.unowned:
        yield (
            f"Patients: {report.unowned} of the scans do not say whose they are, and each counts as a patient of its "
            "own. Say it in a site file (patient_pattern or table) and check that file."
        )
    if told := who_takes(path.name for path in report.unreadable.get("not_an_image", ())):
        yield told
    unnamed = sum(entry.modality == "OT" for entry in report.used)
    if unnamed:
        yield (
            f"Modality: {unnamed} of the scans do not say what they are. Say it in a site file (modality); "
            "only CT is read in Hounsfield units."
        )


def otherwise_declared(report: CheckReport, limits: PatientLimits) -> Iterator[str]:
    """Where `privacy.holds` and the scans in use differ, a line for each kind; nothing where it is not set."""
    for name, rank in RANKS_BY_NAME.items():
        found = sum(entry.kind == f"{rank}d" for entry in report.used)
        if rank in limits.ranks and not found:
            yield (
                f"Warning: privacy.holds declares {name}, and no usable scan is one: patient-level studies would be "
                f"told that this site has {name}, and get noise alone from its {rank}D steps. Take {name} out of "
                "privacy.holds, or see why none is usable."
            )
        elif limits.ranks and rank not in limits.ranks and found:
            yield (
                f"Warning: {found} of the usable scans are {name}, which privacy.holds does not declare: patient-level "
                f"studies will not train on them. Add {name} to privacy.holds if they should."
            )


def _used_table(report: CheckReport) -> Table:
    table = Table(title="What this site would train on", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("scans", no_wrap=True)
    for title in ("used", "patients", "studies", "size in voxels", "spacing in mm"):
        table.add_column(title, justify="right")
    kinds = sorted({(entry.modality or "", entry.kind) for entry in report.used})
    for modality, kind in kinds:
        entries = [entry for entry in report.used if (entry.modality, entry.kind) == (modality, kind)]
        studies = {entry.study for entry in entries if entry.study is not None}
        known = [entry.spacing_mm for entry in entries if "spacing_unknown" not in entry.flags]
        table.add_row(
            f"{_MODALITY_NAMES[modality]} {'images' if kind == '2d' else 'volumes'}",
            str(len(entries)),
            str(len({entry.patient for entry in entries})),
            str(len(studies)) if studies else "-",
            _span([entry.shape for entry in entries], "{:.0f}"),
            _span(known, "{:.2g}") if known else "not stated",
        )
    return table


def _span(values: Iterable[Sequence[float]], form: str) -> str:
    """Least to largest along each axis, as '1-3 x 0.5 x 0.5'."""
    columns = list(zip(*values, strict=True))
    ends = [(form.format(min(column)), form.format(max(column))) for column in columns]
    return " x ".join(low if low == high else f"{low}-{high}" for low, high in ends)


def _left_out_table(report: CheckReport) -> Table:
    series: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for entry in report.entries:
        if entry.reason:
            series[entry.reason] += 1
            files[entry.reason] += len(entry.paths)
    for reason, paths in report.unreadable.items():
        if reason not in files:
            files[reason] += len(paths)
    table = Table(title="What is left out, and why", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("files", justify="right")
    table.add_column("series", justify="right")
    table.add_column("why")
    table.add_column("code", no_wrap=True)
    for reason, count in files.most_common():
        table.add_row(str(count), str(series[reason] or "-"), REASONS.get(reason, ""), reason)
    return table


def _flags_table(report: CheckReport) -> Table:
    counts = Counter(flag for entry in report.used for flag in entry.flags)
    table = Table(title="What is to be known of scans in use", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("scans", justify="right")
    table.add_column("what")
    table.add_column("code", no_wrap=True)
    for flag, count in counts.most_common():
        table.add_row(str(count), FLAGS.get(flag, ""), flag)
    return table
