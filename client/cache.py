"""Preprocessed scans on local disk: each is read and prepared once, and a crop reads only what it needs.

    CACHE/
      3f6c...b2.npy     one scan: (C, *S) uint16, value = stored / 65535, named by content and plan
      3f6c...b2.sealed  the same, where the site has a key: its values alone, opened whole for each crop
      built.jsonl       what was read with which result, one line each: finished work is never done again
      built.lock        held by whoever writes it
      library-7a...json what one plan made of the folders, and their state then: unchanged folders need no reading
      private-7a...json the same for patient-level studies, whose rules of reading keep patients apart

A scan's name is the sha256 of its source bytes, of how its frames are joined, and of the plan; a file that changes
gets another name, and so does every scan when the plan does. Files appear whole or not at all. How long
what stands beside the scans is kept, `client.cache_journal` says.
"""

import contextlib
import hashlib
import hmac
import json
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from client import workers
from client.cache_journal import Record, forget_unused, library_file, note_use, open_journal, plan_digest, tidy
from client.cache_room import check_spare, forget_unfinished, make_room, prepared_bytes
from client.candidates import Candidate
from client.catalogue import Catalogue, catalogue, read, safe_here, state_of
from client.decoders import decoders
from client.looking import FEW_BYTES
from client.patients import check_known, load_secret
from client.reasons import OF_DECODERS, PASSING
from client.site_config import SiteConfig
from unimiss_core import durable, progress
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError
from unimiss_core.json_text import read_object
from unimiss_core.plan import prepare
from unimiss_core.scan import RANKS, Modality, Rank
from unimiss_core.sealing import Damaged, Seal, read_seal
from unimiss_core.study import PlanConfig

READING_VERSION = 7
"""Of the cache's content; a change of rules, readers or `prepare` that changes what is used or its values moves it."""
FULL = 65535
_LEAST_PAUSE_S, _PAUSE = 60.0, 9.0
"""What may pass (`client.reasons.PASSING`) is tried again after so many seconds, and so many times as long as looking
took: a link to nowhere, which never passes, costs an archive of half a million files a tenth of a processor at most."""


@dataclass(frozen=True)
class CachedScan:
    """One preprocessed scan on local disk."""

    key: str
    """sha256 of source content, frame order and plan; 32 hex digits."""
    patient: str
    """Key of the patient; see `client.patients`."""
    modality: Modality
    shape: tuple[int, ...]
    """(C, *S)"""
    spacing_mm: tuple[float, ...]
    path: Path
    offset: int
    """Bytes before the first voxel."""
    key_file: Path | None = field(default=None, kw_only=True)
    """What it is sealed with."""

    @property
    def rank(self) -> Rank:
        return 2 if len(self.shape) == 3 else 3

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Of all images or volumes that it is made of."""
        return (self.modality,)

    def crop(self, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """Values in [0, 1] of a box along S: (C, *box). Reads only the pages that the box touches; a sealed scan, all.

        Raises ConfigError: the scan was sealed with another key, or its file was changed.
        """
        if self.key_file is None:
            stored = _mapped(self.path, self.offset, self.shape)
        else:
            stored = _unsealed(self.path, read_seal(self.key_file), self.shape)
        values = stored[(slice(None), *box)].astype(np.float32)  # apart from the product: NumPy is quicker so
        values *= np.float32(1 / FULL)
        return values


@lru_cache(maxsize=4096)
def _mapped(path: Path, offset: int, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """A scan's stored values, mapped: opening a file costs as much as a crop, and a mapping holds no file open."""
    return np.memmap(path, np.uint16, "r", offset, shape).view(np.ndarray)


def _unsealed(path: Path, seal: Seal, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    try:
        return np.frombuffer(seal.open(path.read_bytes(), _name_in_seal(path)), np.uint16).reshape(shape)
    except Damaged:
        raise ConfigError("a scan of the cache was changed since it was sealed; delete the cache folder") from None


def _name_in_seal(path: Path) -> str:
    return f"scan/{path.name}"


@dataclass(frozen=True)
class Library:
    """All that a site trains on."""

    scans: tuple[CachedScan, ...]
    left_out: Mapping[str, int]
    """Reason -> series, images or unreadable files left out for it."""
    assumed: Mapping[int, int] = field(default_factory=dict)
    """As `Catalogue.assumed`."""
    channels: tuple[int, ...] = ()
    """Of labelled scans, as of `LabelTable`."""

    def of_rank(self, rank: Rank) -> tuple[CachedScan, ...]:
        return tuple(scan for scan in self.scans if scan.rank == rank)

    @property
    def ranks(self) -> frozenset[Rank]:
        return frozenset(rank for rank in RANKS if self.of_rank(rank))


def open_library(site: SiteConfig, plan: PlanConfig) -> Library:
    """The site's scans, each in the cache; reads what is new, in parallel, reporting `progress.Preparing`.

    Folders in which no file came, went or changed since are not read at all.
    Raises NoUsableScanError: nothing is usable. Raises ConfigError: a wrong table, or no room for the cache.
    """
    library = _opened(site, plan, by_patient=False)
    if not library.scans:
        said = ", ".join(f"{count} {reason}" for reason, count in library.left_out.items()) or "the folders are empty"
        raise NoUsableScanError(
            f"site '{site.name}': no usable scan in {len(site.data)} data folder(s): {said}; "
            f"see 'unimiss-site check' for each reason"
        )
    return library


def open_private_library(site: SiteConfig, plan: PlanConfig, *, evicts: bool = True) -> Library:
    """The scans for a patient-level study: it may hold none, for that there are any is not to show, each says whose it
    is, and each patient has those that it would have if there were no others (docs/privacy.md). Raises
    UnknownPatientError, before anything is done that hangs on the plan; and ConfigError as `open_library`.

    evicts: whether scans of other plans may go for these.
    """
    return _opened(site, plan, by_patient=True, evicts=evicts)


def _unwritable(site: SiteConfig, why: str) -> ConfigError:
    return ConfigError(
        f"site '{site.name}': its state or cache folder cannot be used: {why}; make room, or point "
        f"'state' and 'cache' to another disk"
    )


def _opened(site: SiteConfig, plan: PlanConfig, *, by_patient: bool, evicts: bool = True) -> Library:
    """by_patient: each scan has to say whose it is, and nothing is decided over several patients."""
    try:
        return _looked_up(site, plan, by_patient=by_patient, evicts=evicts)
    except OSError as error:  # of its own files: what goes wrong with a scan has become a reason by now
        raise _unwritable(site, error.strerror or "unknown error") from None


def _looked_up(site: SiteConfig, plan: PlanConfig, *, by_patient: bool, evicts: bool) -> Library:
    def show(done: int, total: int) -> None:
        progress.report(progress.Preparing(site.name, done, total, is_secret=by_patient))

    secret = load_secret(site.state)
    folder = site.cache_folder
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state, file = state_of(site.data, secret), library_file(folder, plan, by_patient=by_patient)
    site.seal()  # a key that cannot be read is told before hours of reading scans
    if (library := _remembered(site, file, state)) is not None:
        check_known(site, library.assumed if by_patient else {})
        note_use(file)
        return library
    began = time.monotonic()
    found = catalogue(
        site.data,
        secret,
        interpolate=plan.interpolates,
        by_patient=by_patient,
        processes=site.workers,
        looked=lambda files: show(files, 0),
    )
    check_known(site, found.assumed if by_patient else {})
    library = _library(site, found, _built(site, plan, found, secret, show, evicts))
    _remember(site, file, state, library, took_s=time.monotonic() - began)
    return library


def _built(
    site: SiteConfig, plan: PlanConfig, found: Catalogue, secret: bytes, show: Callable[[int, int], None], evicts: bool
) -> list[Record]:
    """What became of each candidate; those that no journal knows are read now. show: is told how many of how many."""
    folder = site.cache_folder
    forget_unfinished(folder)
    forget_unused(folder)
    stamps = [_stamp(candidate, plan, secret) for candidate in found.candidates]
    tidy(folder, plan_digest(plan), stamps)
    with open_journal(folder) as journal:
        records = journal.records
        missing = [index for index, stamp in enumerate(stamps) if not _is_done(records.get(stamp), site)]
        wanted = [found.candidates[index] for index in missing]
        make_room(site, wanted, plan, kept=_names(site, records, stamps), evicts=evicts)
        tasks = [_Build(found.candidates[index], plan, stamps[index], folder, site.state_key) for index in missing]
        done = len(stamps) - len(tasks)
        show(done, len(stamps))
        for index, outcome in _outcomes(tasks, site.workers):
            if isinstance(outcome, ScanError) and outcome.reason == "cannot_write":
                raise _unwritable(site, outcome.detail)
            if isinstance(outcome, ScanError):
                outcome = Record(tasks[index].stamp, reason=outcome.reason, decoders=decoders(), plan=plan_digest(plan))
            record = records[outcome.stamp] = outcome
            if record.reason not in PASSING:
                journal.note(record)
            done += 1
            show(done, len(stamps))
    return [records[stamp] for stamp in stamps]


# ---------------------------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class _Build:
    candidate: Candidate
    plan: PlanConfig
    stamp: str
    folder: Path
    key_file: Path | None


def _outcomes(tasks: Sequence[_Build], processes: int | None) -> Iterator[tuple[int, Record | ScanError]]:
    # What is read here has no limit of memory, so a scan must be far from it: else its others would decide about it.
    unfolded = sum(prepared_bytes(task.candidate, task.plan) for task in tasks)
    if unfolded <= FEW_BYTES and safe_here([task.candidate for task in tasks]):
        return workers.run_here(build, tasks)
    return workers.run(build, tasks, workers=processes, time_limit_s=workers.READING_LIMIT_S)


def build(task: _Build) -> Record:
    """Read and prepare one scan and put it into the cache, unless its content is there already."""
    key = content_key(task.candidate, task.plan)
    path = scan_file(task.folder, key, task.key_file)
    values, spacing = prepare(read(task.candidate), task.plan)
    seal = None if task.key_file is None else read_seal(task.key_file)
    offset = write_scan(path, np.rint(values * FULL).astype(np.uint16), seal)
    return Record(task.stamp, key, values.shape, spacing, offset, plan=plan_digest(task.plan))


def scan_file(folder: Path, key: str, key_file: Path | None) -> Path:
    return folder / f"{key}{'.npy' if key_file is None else '.sealed'}"


def write_scan(path: Path, stored: NDArray[np.uint16], seal: Seal | None) -> int:
    """Write an .npy file, or its values sealed, whole or not at all; returns the bytes before its first value.

    Raises ScanError(cannot_write), which is the cache's fault and not the scan's.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    check_spare(path.parent, stored.nbytes)
    try:
        with partial.open("wb") as file:
            values = np.ascontiguousarray(stored).data
            if seal is None:
                npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(stored))
            offset = file.tell()
            file.write(values if seal is None else seal.seal(values, _name_in_seal(path)))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ScanError("cannot_write", error.strerror or "unknown error") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return offset


def content_key(candidate: Candidate, plan: PlanConfig) -> str:
    """sha256 of a scan's source bytes, of how its frames are joined, and of the plan; 32 hex digits."""
    digest = hashlib.sha256(_recipe(candidate, plan).encode())
    for path in candidate.paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _recipe(candidate: Candidate, plan: PlanConfig) -> str:
    """What besides the bytes decides the result, as text without names."""
    frames: list[object] = []
    if candidate.stack is not None:
        order = {file: place for place, file in enumerate(candidate.files)}
        stack = candidate.stack
        frames = [[order[frame.file], frame.number] for frame in stack.frames]
        frames += [stack.slots, stack.shifts, stack.gap_mm]
    return json.dumps([READING_VERSION, candidate.modality, frames, plan.canonical()])


def _stamp(candidate: Candidate, plan: PlanConfig, secret: bytes) -> str:
    """Names a candidate by its files' paths, sizes and times: equal stamps need no reading to know the content."""
    facts = []
    for path in candidate.paths:
        try:
            status = path.stat()
            facts.append([os.fspath(path), status.st_size, status.st_mtime_ns])
        except OSError:
            facts.append([os.fspath(path), -1, -1])
    text = json.dumps([_recipe(candidate, plan), facts])
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:32]


def _is_done(record: Record | None, site: SiteConfig) -> bool:
    if record is None or (record.offset == 0 and not record.reason and site.state_key is None):  # it was sealed then
        return False
    if record.reason in OF_DECODERS and record.decoders != decoders():
        return False
    if record.reason:
        return True
    file = scan_file(site.cache_folder, record.key, site.state_key)
    try:
        return _is_whole(file.stat().st_size, record.offset, record.shape)
    except OSError:
        return False


def _is_whole(size: int, offset: int, shape: Sequence[int]) -> bool:
    """Whether a file of so many bytes holds the scan: one that a failing disk cut off would fail in mid-round."""
    return size >= offset + np.dtype(np.uint16).itemsize * math.prod(shape)


def _names(site: SiteConfig, records: Mapping[str, Record], stamps: Sequence[str]) -> set[str]:
    found = (records[stamp].key for stamp in stamps if stamp in records)
    return {scan_file(site.cache_folder, key, site.state_key).name for key in found}


# ---------------------------------------------------------------------------------------------------------- memory


def _remember(site: SiteConfig, file: Path, state: str, library: Library, *, took_s: float) -> None:
    places = ("path", "key_file")  # which are the site file's
    scans = [{name: value for name, value in vars(scan).items() if name not in places} for scan in library.scans]
    content = {"version": READING_VERSION, "state": state, "scans": scans, "left_out": dict(library.left_out)}
    content["sealed"] = site.state_key is not None
    content["assumed"] = list(library.assumed.items())  # JSON's keys are text
    now = time.time()
    content |= {"decoders": decoders(), "at": now, "again": now + max(_LEAST_PAUSE_S, _PAUSE * took_s)}
    durable.write_text(file, json.dumps(content))


def _remembered(site: SiteConfig, file: Path, state: str) -> Library | None:
    """What `file` holds, where neither folders nor cache have changed since, and nothing is to be tried again."""
    folder = file.parent
    try:
        content = read_object(file)
        found = content["version"], content["state"], content.get("sealed", False)
        if found != (READING_VERSION, state, site.state_key is not None):
            return None
        left_out = content["left_out"].keys()
        if left_out & OF_DECODERS and content["decoders"] != decoders():
            return None
        if left_out & PASSING and not content["at"] <= time.time() < content["again"]:
            return None
        scans = tuple(
            CachedScan(
                path=scan_file(folder, raw["key"], site.state_key),
                key_file=site.state_key,
                **raw | {name: tuple(raw[name]) for name in ("shape", "spacing_mm")},
            )
            for raw in content["scans"]
        )
        assumed = {int(number): int(count) for number, count in content["assumed"]}
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        if not all(_is_whole(sizes[scan.path.name], scan.offset, scan.shape) for scan in scans):
            return None
        return Library(scans, content["left_out"], assumed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _library(site: SiteConfig, found: Catalogue, records: Sequence[Record]) -> Library:
    reasons = Counter(entry.reason for entry in (*found.left_out, *found.unreadable))
    scans: dict[tuple[str, str], CachedScan] = {}
    for candidate, record in zip(found.candidates, records, strict=True):
        if record.reason:
            reasons[record.reason] += 1
        elif (candidate.patient, record.key) in scans:
            reasons["duplicate"] += 1
        else:
            scans[candidate.patient, record.key] = CachedScan(
                key=record.key,
                patient=candidate.patient,
                modality=candidate.modality,
                shape=record.shape,
                spacing_mm=record.spacing_mm,
                path=scan_file(site.cache_folder, record.key, site.state_key),
                offset=record.offset,
                key_file=site.state_key,
            )
    return Library(tuple(scans.values()), dict(sorted(reasons.items())), found.assumed)
