"""What a site's folders hold: every file looked at by content, every scan found, everything else with its reason.

`catalogue` reads headers only; `read` decodes one of the scans it found. Nothing here keeps a patient's name.
"""

import hashlib
import hmac
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from client import dicom, nifti, pictures, workers
from client.candidates import (
    Candidate,
    LeftOut,
    of_each_patient,
    without_absurd_sizes,
    without_lone_slices,
)
from client.label_maps import no_labels
from client.listing import files_of, is_folder
from client.looking import FEW_BYTES, FEW_FILES, Look, Plain, bytes_of, looks
from client.patients import Listed, Patient, patient_of, ruled_patient
from client.series import Group, Header, Stack, sort_out
from client.site_config import DataSource
from client.volumes import assemble
from unimiss_core.errors import ScanError
from unimiss_core.scan import Modality, Scan


@dataclass(frozen=True)
class Catalogue:
    candidates: tuple[Candidate, ...]
    left_out: tuple[LeftOut, ...]
    unreadable: tuple[LeftOut, ...]
    """Files of which nothing can be said but the reason, one each."""
    files_seen: int
    assumed: Mapping[int, int] = field(default_factory=dict)
    """Number of a source, from 0 -> its files that count as a patient each because nothing says whose they are. It
    hangs on files and site file alone, never on a study's plan."""


def catalogue(
    sources: Sequence[DataSource],
    secret: bytes,
    *,
    interpolate: bool = False,
    by_patient: bool = False,
    nameless: bool = False,
    processes: int | None = None,
    isolate: bool = False,
    looked: Callable[[int], None] | None = None,
) -> Catalogue:
    """Look at every file of `sources`.

    secret: makes patient keys. interpolate: whether a few missing slices may be made up. by_patient: sort out each
    patient's files as if there were no others, so that none decides about another's scans: a promise of what a patient
    may change rests on it. nameless: DICOM without a PatientID counts, all as of one patient. processes: readers; None
    takes one for each core. isolate: read in other processes even where there is little to read. looked: called with
    the number of files looked at as the work goes on.
    Raises ConfigError for a wrong table.
    """
    parts: list[Catalogue] = []
    done = 0
    for source in sources:
        files = files_of(source)
        found: dict[str, Header | Plain | ScanError] = {}
        tasks = [Look(source.folder, file, secret) for file in files]
        for index, outcome in looks(tasks, processes=processes, isolate=isolate):
            found[tasks[index].file] = outcome
            done += 1
            if looked is not None:
                looked(done)
        outcomes = {file: (found[file], files[file]) for file in files}
        how = {"interpolate": interpolate, "by_patient": by_patient, "nameless": nameless}
        parts.append(_sorted_out(source, outcomes, secret, **how))
    candidates = [candidate for part in parts for candidate in part.candidates]
    together = of_each_patient(candidates, lambda one: one.patient) if by_patient else [candidates]
    sifted = [without_lone_slices(members) for members in together]
    return Catalogue(
        candidates=tuple(one for kept, _ in sifted for one in kept),
        left_out=(*(entry for part in parts for entry in part.left_out), *(one for _, lone in sifted for one in lone)),
        unreadable=tuple(entry for part in parts for entry in part.unreadable),
        files_seen=sum(part.files_seen for part in parts),
        assumed={number: count for number, part in enumerate(parts) if (count := _assumed(part))},
    )


def _assumed(part: Catalogue) -> int:
    return sum("patient_assumed" in candidate.flags for candidate in part.candidates)


def state_of(sources: Sequence[DataSource], secret: bytes) -> str:
    """What all files of `sources` are called, how large they are and when they changed, as one HMAC.

    Equal states need no look at a file. Nothing is opened but tables. Raises ConfigError for a wrong table.
    """
    digest = hmac.new(secret, digestmod=hashlib.sha256)
    for source in sources:
        digest.update(source.model_dump_json().encode())
        if source.table is not None:
            digest.update(hashlib.sha256(source.table.path.read_bytes()).digest())
        folder = os.fspath(source.folder)
        for file in files_of(source):
            digest.update(f"{file!r} {_size_and_time(f'{folder}/{file}')}".encode())
    return digest.hexdigest()


def _size_and_time(path: str) -> tuple[int, int]:
    """Of one file among half a million: plain calls, since a Path each would take longer than the disk."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def read(candidate: Candidate) -> Scan:
    """Decode one scan, which is one image or volume. Raises ScanError with the reason why it cannot be used."""
    if candidate.format == "nifti":
        return no_labels(nifti.read_nifti(candidate.paths[0], candidate.modality, volume=candidate.volume))
    if candidate.format == "picture":
        return no_labels(pictures.read_picture(candidate.paths[0], candidate.modality))
    assert candidate.stack is not None
    return assemble(candidate.stack, _frames_of(candidate.folder, candidate.stack), candidate.modality)


def read_whole(candidate: Candidate) -> tuple[Scan, ...]:
    """All that the scan is made of: what `read` decodes of each part, or of itself where it has none; as it raises."""
    parts = candidate.parts or (candidate,)
    if len({part.paths for part in parts}) == 1 < len(parts):
        return volumes_of(parts[0].paths[0], [(part.volume, part.modality) for part in parts])
    return tuple(map(read, parts))


def volumes_of(path: Path, wanted: Sequence[tuple[int, Modality]]) -> tuple[Scan, ...]:
    """Scans that are volumes of one NIfTI file, each (number, modality) as `read` decodes it; raises as it does."""
    return tuple(map(no_labels, nifti.read_volumes(path, wanted)))


def read_one(path: Path, modality: Modality | None = None, *, interpolate: bool = False) -> Scan:
    """The one scan that a file, or the folder of a series, holds; arguments as of `DataSource` and `catalogue`.

    For a worker, or files that are known to be safe (`safe_here`). Raises ScanError: there is none, with its reason, or
    `several_scans`.
    """
    return read(only_one(path, modality, interpolate=interpolate))


def read_one_apart(path: Path, modality: Modality | None = None, *, interpolate: bool = False) -> Scan:
    """`read_one`, in a process of its own where a codec may crash or much memory is asked for. Raises as it does."""
    found = only_one(path, modality, interpolate=interpolate)
    return workers.read_single(read, found, here=safe_here([found]))


def only_one(path: Path, modality: Modality | None = None, *, interpolate: bool = False) -> Candidate:
    """What `read_one` reads, by its headers. Raises ScanError as it does."""
    return only_of(catalogue_one(path, modality, interpolate=interpolate))


def only_of(found: Catalogue) -> Candidate:
    """The one scan in it. Raises ScanError: as `read_one`."""
    if len(found.candidates) > 1:
        raise ScanError("several_scans", f"{len(found.candidates)} scans")
    if not found.candidates:
        raise ScanError(next((one.reason for one in (*found.left_out, *found.unreadable)), "not_an_image"))
    return found.candidates[0]


def catalogue_one(path: Path, modality: Modality | None = None, *, interpolate: bool = False) -> Catalogue:
    """What one file, or the folder of one series, holds: whoever names it knows whose it is, and wants lone slices."""
    (found,) = catalogue_each([(path, modality)], interpolate=interpolate, processes=1)
    return found


def catalogue_each(
    named: Sequence[tuple[Path, Modality | None]],
    *,
    interpolate: bool = False,
    processes: int | None = None,
    looked: Callable[[int], None] | None = None,
) -> list[Catalogue]:
    """`catalogue_one` of each path, with patients' keys that can be compared. processes, looked: as of `catalogue`."""
    secret = secrets.token_bytes(32)
    found: list[tuple[DataSource, list[str]]] = []
    for path, modality in named:
        is_series = is_folder(path)
        source = DataSource(folder=path if is_series else path.parent, modality=modality)
        found.append((source, list(files_of(source)) if is_series else [path.name]))
    tasks = [Look(source.folder, file, secret) for source, files in found for file in files]
    outcomes: dict[int, Header | Plain | ScanError] = {}
    for index, outcome in looks(tasks, processes=processes, isolate=False):
        outcomes[index] = outcome
        if looked is not None:
            looked(len(outcomes))
    in_order = iter([outcomes[index] for index in range(len(tasks))])
    how = {"interpolate": interpolate, "by_patient": False, "nameless": True}
    return [
        _sorted_out(source, {file: (next(in_order), None) for file in files}, secret, **how) for source, files in found
    ]


def safe_here(candidates: Sequence[Candidate]) -> bool:
    """Whether to read these in this process: little, and by readers that neither crash nor hang."""
    if any(candidate.compressed for candidate in candidates):
        return False
    count = sum(len(candidate.files) for candidate in candidates)
    held = (math.prod(part.shape) for candidate in candidates for part in candidate.parts or (candidate,))
    unpacked = 4 * sum(held)  # a small file may hold a large scan
    stored = bytes_of(path for one in candidates for path in one.paths)
    return count <= FEW_FILES and max(stored, unpacked) <= FEW_BYTES


def safe_to_read_here(paths: Iterable[Path]) -> bool:
    """`safe_here` of all that lies there, whose headers are looked at until it is not; what is named several times is
    read as often."""
    found: list[Candidate] = []
    for path in paths:
        outcome = workers.attempt(catalogue_one, path)
        found += () if isinstance(outcome, ScanError) else outcome.candidates
        if not safe_here(found):
            return False
    return True


def _sorted_out(
    source: DataSource,
    files: Mapping[str, tuple[Header | Plain | ScanError, Listed | None]],
    secret: bytes,
    *,
    interpolate: bool,
    by_patient: bool,
    nameless: bool,
) -> Catalogue:
    """Candidates and left-outs among the files of one source, in the order of the files; as `catalogue`."""
    headers: list[Header] = []
    candidates: list[Candidate] = []
    left_out: list[LeftOut] = []
    unreadable: list[LeftOut] = []
    seen = 0
    for file, (outcome, listed) in files.items():
        if isinstance(outcome, ScanError):
            unreadable.append(LeftOut(source.folder, (file,), outcome.reason))
        elif isinstance(outcome, Header):
            header = _owned(outcome, source, listed, secret, nameless=nameless)
            if header.patient is not None and not _in_range(header.patient, source):
                continue
            headers.append(header)
        else:
            entry = _plain_candidate(outcome, source, listed, secret)
            if entry is None:
                continue
            if isinstance(entry, LeftOut):
                left_out.append(entry)
            else:
                candidates.append(entry)
        seen += 1
    together = of_each_patient(headers, lambda header: header.patient) if by_patient else [headers]
    for group in chain.from_iterable(sort_out(members, interpolate=interpolate) for members in together):
        if group.stack is None:
            left_out.append(_left_out(source, group))
        else:
            candidates.append(_dicom_candidate(source, group, group.stack, secret))
    kept, absurd = without_absurd_sizes(candidates)
    return Catalogue(tuple(kept), (*left_out, *absurd), tuple(unreadable), seen)


def _in_range(patient: Patient, source: DataSource) -> bool:
    return source.patient_range[0] <= patient.place < source.patient_range[1]


def _owned(header: Header, source: DataSource, listed: Listed | None, secret: bytes, *, nameless: bool) -> Header:
    """The header with the patient that the site file's rules give it; left out where there is none."""
    try:
        text = ruled_patient(source, PurePosixPath(header.file), listed)
    except ScanError as error:
        return replace(header, patient=None, reason=header.reason or error.reason)
    if text is not None:
        return replace(header, patient=patient_of(text, secret))
    if header.patient is None and nameless:
        return replace(header, patient=patient_of("", secret))
    if header.patient is None:
        return replace(header, reason=header.reason or "no_patient_id")
    return header


def _plain_candidate(
    plain: Plain, source: DataSource, listed: Listed | None, secret: bytes
) -> Candidate | LeftOut | None:
    """None: of a patient that this source does not take."""
    default: Modality = "OT" if plain.format == "nifti" else "XR"
    modality = (listed.modality if listed else None) or source.modality or default
    shape = tuple(length for length in plain.shape if length > 1) if 1 in plain.shape else plain.shape
    spacing = tuple(
        step for step, length in zip(plain.spacing_mm, plain.shape, strict=True) if length > 1 or shape == plain.shape
    )
    try:
        text = ruled_patient(source, PurePosixPath(plain.file), listed)
    except ScanError as error:
        return LeftOut(source.folder, (plain.file,), error.reason, modality, shape, spacing)
    patient = patient_of(text if text is not None else plain.file, secret)
    if not _in_range(patient, source):
        return None
    return Candidate(
        folder=source.folder,
        files=(plain.file,),
        format=plain.format,
        patient=patient.key,
        modality=modality,
        shape=shape,
        spacing_mm=spacing,
        flags=plain.flags if text is not None or source.file_is_patient else (*plain.flags, "patient_assumed"),
        compressed=plain.compressed,
    )


def _dicom_candidate(source: DataSource, group: Group, stack: Stack, secret: bytes) -> Candidate:
    first = group.headers[0]
    assert first.modality is not None
    assert first.patient is not None
    return Candidate(
        folder=source.folder,
        files=tuple(dict.fromkeys(frame.file for frame in stack.frames)),
        format="dicom",
        patient=first.patient.key,
        modality=first.modality,
        shape=stack.shape,
        spacing_mm=stack.spacing_mm,
        flags=stack.flags,
        study=patient_of(first.study, secret).key if first.study else "",
        stack=stack,
        compressed=any(header.compressed for header in group.headers),
    )


def _left_out(source: DataSource, group: Group) -> LeftOut:
    first = group.headers[0]
    files = tuple(dict.fromkeys(frame.file for frame in group.frames)) or tuple(h.file for h in group.headers)
    in_plane = next((frame.spacing_mm for frame in group.frames if frame.spacing_mm), ())
    slices = len(group.frames) or len(group.headers)
    return LeftOut(
        folder=source.folder,
        files=files,
        reason=group.reason,
        modality=first.modality,
        shape=first.matrix if slices == 1 else (slices, *first.matrix),
        spacing_mm=in_plane,
        patient=first.patient.key if first.patient else "",
    )


def _frames_of(folder: Path, stack: Stack) -> NDArray[np.float32]:
    """(N, H, W): the frames of a stack in its order; a file with many is opened once."""
    by_file: dict[str, list[int]] = {}
    for index, frame in enumerate(stack.frames):
        by_file.setdefault(frame.file, []).append(index)
    volume = np.empty((len(stack.frames), *stack.matrix), dtype=np.float32)
    for file, indices in by_file.items():
        values = dicom.read_frames(folder / file, [stack.frames[index].number for index in indices])
        if values.shape[1:] != stack.matrix:
            raise ScanError("bad_pixel_description")
        volume[indices] = values
    return volume
