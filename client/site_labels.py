"""A site's labelled scans for a study of `task: finetune`: read and prepared once, kept beside the cache.

    CACHE/labelled/
      3f6c...b2.json         what became of one scan: shape and spacing, or the reason why it is left out
      3f6c...b2.npy          its values, as in the cache (`client.cache`); .sealed where the site has a key
      3f6c...b2-mask.npy     of a segmentation, its classes on the same grid

Each scan is read by itself, so that no patient's decides about another's, and is named by an HMAC of its files' paths,
sizes and times, the plan and the rules for masks: what changes is read again. Labels stand in the site's own table
alone, which is read anew each time.
"""

import hashlib
import hmac
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client import workers
from client.cache import FULL, CachedScan, Library, scan_file, write_scan
from client.cache_room import forget_unfinished
from client.channel_reading import modalities_of, read_channels, require_like_names
from client.decoders import decoders
from client.label_config import LabelData
from client.label_tables import Case, LabelTable, labels_in
from client.labelled import MaskError, labels_of, mask_beside, places_in
from client.labelled_room import STAMP, LabelledRoom
from client.labels_asked import lacking_labels
from client.patients import load_secret, patient_of
from client.reasons import OF_DECODERS, PASSING, REASONS
from client.site_config import SiteConfig
from client.telling import tell_if_heard, tell_once_if_heard
from unimiss_core import durable, progress
from unimiss_core.card_wording import on_one_line
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError, UnknownPatientError, WireError
from unimiss_core.json_text import read_object
from unimiss_core.plan import prepare_channels, resample_labels
from unimiss_core.scan import Modality
from unimiss_core.sealing import read_seal
from unimiss_core.study import PlanConfig, StudyConfig
from unimiss_core.task_config import SupervisionConfig

_VERSION = 5
"""Of what is kept; a change of rules, readers or `prepare` moves it."""
_TOLD = 5
"""Lines of a table that are told of; the others are counted."""


@dataclass(frozen=True)
class LabelledScan(CachedScan):
    """A prepared scan of the site, with its label."""

    target: tuple[int, ...] = field(default=(), kw_only=True)
    """As of `Case`."""
    mask: CachedScan | None = field(default=None, kw_only=True)
    """Its values are classes / 65535."""
    others: tuple[Modality, ...] = field(default=(), kw_only=True)
    """Of its other channels than the first."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return (self.modality, *self.others)

    def classes_in(self, box: tuple[slice, ...]) -> NDArray[np.int64]:
        """Of a mask's box along S: (*box)."""
        assert self.mask is not None
        classes: NDArray[np.int64] = np.rint(self.mask.crop(box)[0] * FULL).astype(np.int64)
        return classes

    def whole(self) -> NDArray[np.float32]:
        """(C, *S) in [0, 1]."""
        return self.crop(self._everywhere)

    def classes(self) -> NDArray[np.int64]:
        """Of the whole mask: (*S)."""
        return self.classes_in(self._everywhere)

    @property
    def _everywhere(self) -> tuple[slice, ...]:
        return tuple(slice(None) for _ in self.shape[1:])

    @cached_property
    def places(self) -> Mapping[int, NDArray[np.int32]]:
        """Class that is there -> (n, rank) indices of some of its voxels."""
        return places_in(self.classes())


def check_labels(config: SiteConfig, study: StudyConfig) -> None:
    """By the site file, and of a folder the names in its dataset.json, before a scan or a table is read.

    Raises WireError `no_labels`: it has none for this study; why, the site's own screen says. UnknownPatientError: a
    patient-level study counts patients, and nothing says whose they are.
    """
    if study.finetune is None:
        return
    if (lacking := lacking_labels(config, study.finetune)) is not None:
        told = f"takes no part in study '{study.name}': {lacking}"
        tell_once_if_heard(config.name, told, state=config.state)  # each round asks again
        raise WireError("no_labels", "the site has no labels for the study's task")
    assert config.labels is not None
    if study.privacy.mode == "patient" and not config.labels.knows_patients:
        raise UnknownPatientError(
            f"site '{config.name}': a patient-level study counts patients, and nothing says whose these masks are; "
            "give labels.data a patient_pattern, or labels.file_is_patient: true where every file is of another patient"
        )


def labels_told(config: SiteConfig, study: StudyConfig | None) -> Iterator[str]:
    """For whoever answers for the site: which studies that fine-tune may come; of such a study, what the site's table
    has for it. Reads no scan. Raises ConfigError: what is wrong with the table."""
    labels = config.labels
    if labels is None:
        yield "Studies that fine-tune: none; the site file has no `labels`."
    elif study is None or study.finetune is None:
        of_channels = "" if labels.channels is None else f", of scans of {', '.join(labels.channels)}"
        yield f"Studies that fine-tune: those for {', '.join(labels.classes)}{of_channels} (labels)."
    elif (lacking := lacking_labels(config, study.finetune)) is not None:
        yield f"Study '{study.name}': no; {lacking}."
    else:
        table = _table(labels.data, study)
        cases, task = table.cases, study.finetune.task
        patients = len({case.patient for case in cases})
        told = f"Study '{study.name}': {len(cases)} labelled scans of {patients} patients"
        several = task.name == "classification" and task.kind == "multi_label"
        for number, name in enumerate(task.classes if task.name == "classification" else ()):
            count = sum(case.target[number] == 1 if several else case.target[0] == number for case in cases)
            told += f"{':' if number == 0 else ','} {on_one_line(name)} {count}"
        yield f"{told}."
        if (meant := _meant_for_judging(cases)) is not None:
            yield f"{meant.capitalize()}."
        if table.left_out:
            why = ", for a patient-level study takes each line by itself" if study.privacy.mode == "patient" else ""
            yield f"Left out{why}: {_shown(table.left_out)}."


def _meant_for_judging(cases: Sequence[Case]) -> str | None:
    """Lines that the table's own split keeps from training, which a federation does not ask for."""
    if not (count := sum(case.part in ("validation", "test") for case in cases)):
        return None
    return (
        f"the table's split keeps {count} of {len(cases)} labelled scans for validation or test, and a federation "
        "trains on all of them; leave them out by labels.data.where, or nobody can judge the model by them"
    )


def _table(data: LabelData, study: StudyConfig) -> LabelTable:
    """In a patient-level study a wrong line is left out, as a scan that cannot be read is: that a round failed of it
    would be told to the coordinator, and leaving one line out changes nothing of another patient's."""
    assert study.finetune is not None
    return labels_in(data, study.finetune.task, one_by_one=study.privacy.mode == "patient")


def open_labelled(site: SiteConfig, study: StudyConfig, *, evicts: bool = True) -> Library:
    """The site's labelled scans of the task's rank; reads what is new, in parallel. Labels of a scan that cannot be
    read, or of a mask that does not go with its scan, are left out, and the site's screen says which lines; in a
    patient-level study so are lines that are wrong themselves.

    evicts: whether scans of other tables and plans may go for these. Raises as `check_labels`; NoUsableScanError, but
    not in a patient-level study; ConfigError: what is wrong with the table, or that the cache cannot be written, or not
    hold them.
    """
    check_labels(site, study)
    assert site.labels is not None
    assert study.finetune is not None
    try:
        table = _table(site.labels.data, study)
        scans, reasons = _opened(site, study, table, evicts=evicts)
    except ConfigError as error:
        raise ConfigError(f"site '{site.name}': labels: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"site '{site.name}': its cache cannot be used: {error.strerror or 'unknown error'}; make room, or point "
            "'cache' to another disk"
        ) from None
    if not scans and study.privacy.mode != "patient":
        said = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise NoUsableScanError(f"site '{site.name}': none of its labelled scans can be used: {said}")
    return Library(scans, reasons, channels=table.channels)


def _opened(
    site: SiteConfig, study: StudyConfig, table: LabelTable, *, evicts: bool
) -> tuple[tuple[LabelledScan, ...], dict[str, int]]:
    secret, folder = load_secret(site.state), site.cache_folder / "labelled"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    forget_unfinished(folder)
    site.seal()  # a key that cannot be read is told before hours of reading scans
    tasks = [_task(site, study, table, case, secret, folder) for case in table.cases]
    if (meant := _meant_for_judging(table.cases)) is not None and not all(task.record.exists() for task in tasks):
        tell_if_heard(site.name, meant)
    if table.left_out:
        tell_once_if_heard(site.name, f"labels left out: {_shown(table.left_out)}", state=site.state)
    room = LabelledRoom(site, folder, {task.stamp for task in tasks}, evicts=evicts)
    records = _records(site, tasks, room, is_secret=study.privacy.mode == "patient")
    scans = (
        _scan(site, task, record, case, secret)
        for task, record, case in zip(tasks, records, table.cases, strict=True)
        if not record.reason
    )
    reasons = Counter(record.reason for record in records if record.reason)
    reasons += Counter({"label_unfit": len(table.left_out)})
    return tuple(scans), dict(sorted(reasons.items()))


def _tell_of_left_out(site: SiteConfig, tasks: Sequence["_Task"], records: Sequence["_Record"]) -> None:
    """On the site's own screen."""
    pairs = zip(tasks, records, strict=True)
    left_out = [
        f"line {task.number}: {record.detail or f'{record.reason} ({REASONS[record.reason]})'}"
        for task, record in pairs
        if record.reason
    ]
    if left_out:
        tell_if_heard(site.name, f"labelled scans left out: {_shown(left_out)}")


def _shown(left_out: Sequence[str]) -> str:
    """Lines of the site's table, never a patient or a path."""
    more = f"; and {len(left_out) - _TOLD} more" if len(left_out) > _TOLD else ""
    return "; ".join(left_out[:_TOLD]) + more


# ---------------------------------------------------------------------------------------------------------- preparing


@dataclass(frozen=True)
class _Task:
    """One scan to be read and prepared, in a process of its own."""

    number: int
    """As of `Case`."""
    scans: tuple[Path, ...]
    """Of each channel; `numbers` and `modalities` as of `read_channels`."""
    numbers: tuple[int, ...]
    modalities: tuple[Modality | None, ...]
    mask: Path | None
    plan: PlanConfig
    asked: SupervisionConfig
    may_be_empty: bool
    folder: Path
    stamp: str
    key_file: Path | None

    @property
    def record(self) -> Path:
        return self.folder / f"{self.stamp}.json"


@dataclass(frozen=True)
class _Record:
    """What became of one scan; the content of its .json."""

    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    modality: Modality = "OT"
    offset: int = 0
    mask_offset: int = 0
    key: str = ""
    """sha256 of the values; 32 hex digits: equal scans have equal ones, whatever their files are called."""
    reason: str = ""
    detail: str = ""
    decoders: str = ""
    """Those that were there when a reason was found."""
    others: tuple[Modality, ...] = ()
    """As of `LabelledScan`."""


def _task(site: SiteConfig, study: StudyConfig, table: LabelTable, case: Case, secret: bytes, folder: Path) -> _Task:
    assert site.labels is not None
    assert study.finetune is not None
    task, mask = study.finetune.task, table.folder / case.mask if case.mask else None
    scans, kinds = tuple(table.folder / file for file in case.files), modalities_of(task, table.modality)
    facts = [
        _VERSION,
        table.modality,
        study.plan.canonical(),
        task.rank,
        *(one for scan in scans for one in _files(scan)),
    ]
    if task.channels is not None:
        facts.append([list(map(os.fspath, scans)), table.channels, kinds, modalities_of(task, None), task.other_grids])
    if mask is not None:
        facts += [len(task.classes), site.labels.allow_empty_masks, *_files(mask)]
    stamp = hmac.new(secret, json.dumps(facts).encode(), hashlib.sha256).hexdigest()[:STAMP]
    return _Task(
        number=case.number,
        scans=scans,
        numbers=table.channels,
        modalities=kinds,
        mask=mask,
        plan=study.plan,
        asked=study.finetune,
        may_be_empty=site.labels.allow_empty_masks,
        folder=folder,
        stamp=stamp,
        key_file=site.state_key,
    )


def _files(path: Path) -> list[object]:
    """Path, size and time of a file, or of each in a series' folder."""
    found: list[object] = []
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError:  # a folder that may not be listed, a name that is too long: the scan's own matter
        files = [path]
    for file in files:
        try:
            status = file.stat()
            found.append([os.fspath(file), status.st_size, status.st_mtime_ns])
        except OSError:
            found.append([os.fspath(file), -1, -1])
    return found


def _records(site: SiteConfig, tasks: Sequence[_Task], room: LabelledRoom, *, is_secret: bool) -> list[_Record]:
    """Of each scan; those that nothing is kept of are read now."""
    found = [_kept(task) for task in tasks]
    missing = [place for place, record in enumerate(found) if record is None]
    done = len(tasks) - len(missing)
    to_read = [tasks[place] for place in missing]
    outcomes = workers.run(build, to_read, workers=site.workers, time_limit_s=workers.READING_LIMIT_S)
    for place, outcome in outcomes:
        if isinstance(outcome, ScanError) and outcome.reason == "cannot_write":
            raise ConfigError(f"the cache cannot be written: {outcome.detail}")
        task = tasks[missing[place]]
        record = outcome if isinstance(outcome, _Record) else _left_out(outcome)
        if record.reason not in PASSING:
            durable.write_text(task.record, json.dumps(asdict(record)))
        if not record.reason:
            room.take(task.stamp, sum(path.stat().st_size for path in _names(task)))
        found[missing[place]] = record
        done += 1
        progress.report(progress.Preparing(site.name, done, len(tasks), is_secret=is_secret))
    whole = [record for record in found if record is not None]
    _tell_of_left_out(site, to_read, [whole[place] for place in missing])
    return whole


def _left_out(error: ScanError) -> _Record:
    return _Record(reason=error.reason, detail=error.detail, decoders=decoders())


def _kept(task: _Task) -> _Record | None:
    try:
        raw = read_object(task.record)
        record = _Record(**raw | {name: tuple(raw[name]) for name in ("shape", "spacing_mm", "others") if name in raw})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if record.reason in OF_DECODERS and record.decoders != decoders():
        return None
    files = [] if record.reason else _names(task)
    sealed = task.key_file is not None
    if record.reason or (all(file.exists() for file in files) and (record.offset == 0) == sealed):
        return record
    return None


def _names(task: _Task) -> list[Path]:
    """Where values, and classes where there are any, are kept."""
    stems = [task.stamp] if task.mask is None else [task.stamp, f"{task.stamp}-mask"]
    return [scan_file(task.folder, stem, task.key_file) for stem in stems]


def build(task: _Task) -> _Record:
    """Read and prepare all that one scan is made of, lay its mask beside it, and keep both. Raises ScanError."""
    rank, interpolate = task.asked.task.rank, task.plan.interpolates
    scans = read_channels(task.scans, task.numbers, task.modalities, interpolate=interpolate)
    if other := next((scan.rank for scan in scans if scan.rank != rank), None):
        raise ScanError("other_rank", f"the scan is of rank {other}, the task of rank {rank}")
    require_like_names(task.asked.task, scans)
    values, spacing = prepare_channels(scans, task.plan, task.asked.task.other_grids)
    stored = [np.rint(values * FULL).astype(np.uint16)]
    if task.mask is not None:
        try:
            mask = mask_beside(task.scans, task.mask)
            if isinstance(mask, MaskError):
                raise mask
            asked = task.asked.task
            classes, may_be_empty = len(asked.classes), task.may_be_empty
            labels = labels_of(scans[0], mask, classes=classes, may_be_empty=may_be_empty, among=asked.channels)
        except MaskError as error:
            raise ScanError("mask_unfit", str(error)) from None
        steps = tuple(new / old for new, old in zip(spacing, scans[0].spacing_mm, strict=True))
        stored.append(resample_labels(labels, values.shape[1:], steps)[None].astype(np.uint16))
    seal = None if task.key_file is None else read_seal(task.key_file)
    offsets = [write_scan(path, array, seal) for path, array in zip(_names(task), stored, strict=True)]
    key = hashlib.sha256(stored[0].tobytes()).hexdigest()[:32]
    kind, *others = (scan.modality for scan in scans)
    return _Record(values.shape, spacing, kind, offsets[0], offsets[-1] if task.mask else 0, key, others=tuple(others))


def _scan(site: SiteConfig, task: _Task, record: _Record, case: Case, secret: bytes) -> LabelledScan:
    """What was kept, under the patient that the table names."""
    patient = patient_of(case.patient, secret).key
    values, *masks = (
        CachedScan(
            key=record.key,
            patient=patient,
            modality=record.modality,
            shape=record.shape if place == 0 else (1, *record.shape[1:]),
            spacing_mm=record.spacing_mm,
            path=path,
            offset=record.offset if place == 0 else record.mask_offset,
            key_file=site.state_key,
        )
        for place, path in enumerate(_names(task))
    )
    return LabelledScan(**vars(values), target=case.target, mask=masks[0] if masks else None, others=record.others)
