"""Which scans are labelled, and with what: CSV tables, MSD and nnU-Net folders, MedMNIST files. No voxel is read here.

Messages name a table's lines by number and a folder's files by their place, never a patient or a path below a root.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np

from client.channel_reading import modality_named
from client.channels import in_words, of_numbers
from client.csv_tables import SHOWN, SURPLUS, refuse, require_columns, rows_of, wrong_paths
from client.finetune_config import FinetuneConfig, MedMnistData
from client.label_config import CsvData, LabelData, MsdData
from client.label_values import LabelError, target_of, wrong_settings
from client.medmnist import opened_arrays
from client.msd_folders import check_labels, images_by_case, masks_by_case, numbers_of, told_in
from unimiss_core import progress
from unimiss_core.card_wording import on_one_line
from unimiss_core.errors import ConfigError
from unimiss_core.scan import Modality
from unimiss_core.task_config import UNKNOWN, ClassificationConfig, SegmentationConfig, TaskConfig

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
_SPELLINGS: Mapping[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_WAY_OUT = "correct it, or the folder that paths begin from (data_root, or --data, of a fine-tuning; --root of a probe)"


@dataclass(frozen=True)
class Case:
    """One labelled scan, before it is read."""

    number: int
    """Line of the table, or place among the files from 1: what messages and results call it."""
    file: str
    """Path below the data's folder, of the first of several channels; empty in a MedMNIST file. For the researcher's
    own eyes."""
    patient: str
    """As the table says it; never shown or written."""
    target: tuple[int, ...] = ()
    """Of a classification: the number of its class; of multi_label one 0, 1 or UNKNOWN for each."""
    mask: str = ""
    """Of a segmentation: path of its mask below the data's folder."""
    part: Part | None = None
    """What the table says it is for, whether or not anyone goes by it."""
    place: tuple[str, int] | None = None
    """Of a MedMNIST file: name of the array, row."""
    others: tuple[str, ...] = ()
    """Paths of its other channels; all are `file` where that holds them as volumes."""

    @property
    def files(self) -> tuple[str, ...]:
        """Path of each channel below the data's folder."""
        return (self.file, *self.others)


@dataclass(frozen=True)
class LabelTable:
    cases: tuple[Case, ...]
    folder: Path
    """What paths of scans and masks begin from."""
    modality: Modality | None = None
    channel: int | None = None
    """Of files that nnU-Net names, CASE_0000, CASE_0001, ...: which one of each case is read."""
    channels: tuple[int, ...] = ()
    """Of a task with channels: which of these, or of a file's volumes, each of them is."""
    left_out: tuple[str, ...] = ()
    """Lines, or a folder's cases, that lack a channel of the task; where each stands by itself, all that are no case:
    what is wrong with them, without a word of their text."""


def label_table(config: FinetuneConfig) -> LabelTable:
    """Every labelled scan that the file's `data` names. Raises ConfigError: what is wrong with it, all at once."""
    data = config.data
    if isinstance(data, MedMnistData):
        assert isinstance(config.task, ClassificationConfig)
        _must_be_a_file("data.file", data.file, config.data_root)
        return LabelTable(_of_medmnist(data, config.task), data.file.parent)
    found = labels_in(data, config.task, given=config.split.name == "given", root=config.data_root)
    if count := len(found.left_out):
        more = " and others" if count > SHOWN else ""
        told = f"left out: {count} scan(s) that lack a channel ({'; '.join(found.left_out[:SHOWN])}{more})"
        progress.report(progress.Note(told))
    return found


def labels_in(
    data: LabelData, task: TaskConfig, *, given: bool = False, one_by_one: bool = False, root: Path | None = None
) -> LabelTable:
    """given: the table says which part each scan is for. one_by_one: a line of a table, or a case of a folder, that
    cannot be used is left out and decides about no other patient's, nor whether there is a table at all. root: what the
    paths of `data` were written below, so that they can be told as they are written.

    Raises ConfigError, as `label_table`; one_by_one, of what is wrong with the whole of it.
    """
    if isinstance(data, CsvData):
        _must_be_a_file("data.table", data.table, root)
        _must_be_a_folder(data.folder, root)
        cases, problems = _of_csv(data, task, given=given, one_by_one=one_by_one)
        channels = tuple(range(task.channel_count or 0))
        return LabelTable(cases, data.folder, data.modality, channels=channels, left_out=problems)
    if not isinstance(task, SegmentationConfig):
        raise ConfigError("data: an msd folder holds masks; the task must be segmentation")
    if (wrong_setting := wrong_settings(data, task)) is not None:
        raise ConfigError(wrong_setting)
    _must_be_a_folder(data.folder, root)
    return _of_msd(data, task, one_by_one=one_by_one)


def _must_be_a_file(setting: str, path: Path, root: Path | None) -> None:
    """Raises ConfigError: nothing is there, which is another mistake than a file of another kind."""
    if not path.is_file():
        raise ConfigError(f"{setting}: there is no file {_as_written(path, root)}; {_WAY_OUT}")


def _must_be_a_folder(path: Path, root: Path | None) -> None:
    if not path.is_dir():
        raise ConfigError(f"data.folder: there is no folder {_as_written(path, root)}; {_WAY_OUT}")


def _as_written(path: Path, root: Path | None) -> str:
    """In the file that names it, and below which folder."""
    if root is None:
        return f"{path.name} where it says"
    return f"{path.relative_to(root)} in {root}" if path.is_relative_to(root) else str(path)


# --------------------------------------------------------------------------------------------------------------- CSV


def _of_csv(
    data: CsvData, task: TaskConfig, *, given: bool, one_by_one: bool
) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Cases, and of lines that are left out what is wrong with them. one_by_one: as of `labels_in`."""
    columns, rows = rows_of(data.table, named=data.table.name, keeps_bytes=one_by_one)
    if not rows and not one_by_one:
        raise ConfigError(f"table {data.table.name}: holds no rows")
    if (wrong_setting := wrong_settings(data, task)) is not None:
        raise ConfigError(wrong_setting)
    _check_columns(data, task, columns, given=given)
    surplus = [row.number for row in rows if row.has_surplus]
    kept = [(row.number, row.cells) for row in rows if row.number not in surplus and row.is_among(data.where)]
    if not kept and not surplus and not one_by_one:
        raise ConfigError(f"table {data.table.name}: no line has what `data.where` asks for")
    lacks = {} if one_by_one else _lacking(kept, data)
    kept = [line for line in kept if line[0] not in lacks]
    problems = [(number, SURPLUS) for number in surplus]
    problems += [(number, said) for number, row in kept for said in _problems(row, data, task, given=given)]
    unclear = {number for number, _ in problems}
    clear = {number: _case(number, row, data, task) for number, row in kept if number not in unclear}
    unlabelled = {number for number, case in clear.items() if set(case.target) == {UNKNOWN}}
    unread = unlabelled | (unclear if one_by_one else set())  # of a scan they say nothing, and a later line may
    problems += _listed_again([line for line in kept if line[0] not in unread], data, by_patient=one_by_one)
    if not one_by_one:
        refuse(f"table {data.table.name}", [f"line {number}: {said}" for number, said in problems])
    wrong = {number: [said] for number, said in lacks.items()}
    for number, said in problems:
        wrong.setdefault(number, []).append(said)
    if not one_by_one:
        _tell_of_unlabelled(data, len(unlabelled), len(clear))
    wrong |= {number: ["of no class it is known whether it is there"] for number in unlabelled if one_by_one}
    left_out = tuple(f"line {number}: {', '.join(wrong[number])}" for number in sorted(wrong))
    dropped = unlabelled | wrong.keys()
    return tuple(case for number, case in clear.items() if number not in dropped), left_out


def _lacking(kept: Sequence[tuple[int, Mapping[str, str]]], data: CsvData) -> dict[int, str]:
    """Lines of patients who lack a channel, for its column is blank, and another's is not, with what is wrong with
    them. None, where no line has every channel: then the setting is wrong."""
    blank = {number: [column for column in data.scan_columns if not row[column]] for number, row in kept}
    lacks = {number: of[0] for number, of in blank.items() if 0 < len(of) < len(data.scan_columns)}
    return {number: f"'{column}' is blank" for number, column in lacks.items()} if len(lacks) < len(kept) else {}


def _tell_of_unlabelled(data: CsvData, unlabelled: int, lines: int) -> None:
    """Raises ConfigError: no line is left."""
    ignored = "(data.missing, data.uncertain: ignore)"
    if unlabelled == lines:
        raise ConfigError(f"table {data.table.name}: no line has a label that is known {ignored}")
    if unlabelled:
        told = f"left out: {unlabelled} line(s) of the table, of which no label is known {ignored}"
        progress.report(progress.Note(told))


def _listed_again(
    kept: Sequence[tuple[int, Mapping[str, str]]], data: CsvData, *, by_patient: bool
) -> Iterator[tuple[int, str]]:
    """Lines of a scan that an earlier line is of; by_patient: of the same patient. Paths are compared as paths: ./A and
    A are one scan, and may not be of two patients, nor may one of its channels."""
    first: dict[tuple[str, tuple[PurePosixPath, ...]], int] = {}
    owners: dict[PurePosixPath, tuple[int, str]] = {}
    for number, row in kept:
        paths, patient = tuple(PurePosixPath(row[column]) for column in data.scan_columns), _whose(row, data)
        scan = (patient if by_patient else "", paths)
        found = [owners.setdefault(path, (number, patient)) for path in paths]
        if first.setdefault(scan, number) != number:
            yield number, f"lists the scan of line {first[scan]} again"
        elif not by_patient and (others := [line for line, whose in found if whose != patient]):
            yield number, f"names a file of line {others[0]}, which is of another patient"


def _check_columns(data: CsvData, task: TaskConfig, known: Sequence[str], *, given: bool) -> None:
    wanted = [*data.scan_columns, *_label_columns(data, task), *_patient_column(data)]
    wanted += [*([data.split] if given else []), *data.where]
    require_columns(data.table.name, known, wanted, "`data` names the columns")


def _problems(row: Mapping[str, str], data: CsvData, task: TaskConfig, *, given: bool) -> Iterator[str]:
    """What is wrong with one line; no text of the line is told, which could be a patient's."""
    paths = (*data.scan_columns, *((data.label,) if isinstance(task, SegmentationConfig) else ()))
    for column in (*paths, *_patient_column(data)):
        if not _is_text(row[column]):
            yield f"'{column}' is no UTF-8"
    yield from wrong_paths(row, paths, data.scan_columns)
    if not _whose(row, data):
        told = f"'{data.patient}' is empty"
        column = data.scan_columns[0]
        yield told if data.patient_pattern is None else f"data.patient_pattern finds no patient in '{column}'"
    if isinstance(task, ClassificationConfig):
        for column in _label_columns(data, task):
            try:
                target_of(row[column], data, task)
            except LabelError as error:
                yield f"{'' if _is_multi_label(task) else 'column '}'{column}' {error}"
    if given and row[data.split].lower() not in _SPELLINGS:
        yield f"'{data.split}' must be train, validation or test"


def _case(number: int, row: Mapping[str, str], data: CsvData, task: TaskConfig) -> Case:
    target: tuple[int, ...] = ()
    if isinstance(task, ClassificationConfig):
        target = tuple(target_of(row[column], data, task) for column in _label_columns(data, task))
    return Case(
        number=number,
        file=row[data.scan_columns[0]],
        others=tuple(row[column] for column in data.scan_columns[1:]),
        patient=_whose(row, data),
        target=target,
        mask="" if target else row[data.label],
        part=_SPELLINGS.get(row.get(data.split, "").lower()),
    )


def _patient_column(data: CsvData) -> tuple[str, ...]:
    return (data.patient,) if data.patient_pattern is None else ()


def _whose(row: Mapping[str, str], data: CsvData) -> str:
    """As the column, or the scan's path, says it; empty where that says nothing."""
    if data.patient_pattern is None:
        return row[data.patient]
    return _patient(row[data.scan_columns[0]], data.patient_pattern) or ""


def _is_text(read: str) -> bool:
    """Whether it was UTF-8."""
    return not any("\udc80" <= letter <= "\udcff" for letter in read)


def _label_columns(data: CsvData, task: TaskConfig) -> tuple[str, ...]:
    return task.classes if _is_multi_label(task) else (data.label,)


def _is_multi_label(task: TaskConfig) -> bool:
    return isinstance(task, ClassificationConfig) and task.kind == "multi_label"


# --------------------------------------------------------------------------------------------------------------- MSD


def _of_msd(data: MsdData, task: SegmentationConfig, *, one_by_one: bool) -> LabelTable:
    masks = masks_by_case(data.folder / "labelsTr")
    images = images_by_case(data.folder / "imagesTr", masks)
    both = sorted(images.keys() & masks.keys())
    if lone := len(images) + len(masks) - 2 * len(both):
        progress.report(progress.Note(f"{lone} image(s) or mask(s) of the folder have no counterpart and are left out"))
    if not both and not one_by_one:
        raise ConfigError("data.folder: imagesTr and labelsTr hold no image with a mask of the same name")
    told = told_in(data.folder / "dataset.json")
    wanted = (data.channel,) if task.channels is None else numbers_of(task, data, told.channels)
    if others := {number for case in both for number in images[case] if number is not None} - {*wanted}:
        progress.report(progress.Note(in_words(wanted, others, told.channels)))
    cases: list[Case] = []
    problems: list[str] = []
    lacks: list[str] = []
    leaves_out = task.channels is not None and not one_by_one
    for number, case in enumerate(both, start=1):
        patient = _patient(case, data.patient_pattern)
        held = of_numbers(wanted, images[case])
        if lacking := [channel for channel in wanted if channel not in held]:
            setting = "data.channel"
            if task.channels is not None:
                setting = f"data.channels: {on_one_line(task.channels[wanted.index(lacking[0])])}"
            (lacks if leaves_out else problems).append(f"case {number}: has no channel {lacking[0]} ({setting})")
        elif patient is None:
            problems.append(f"case {number}: data.patient_pattern does not match its name")
        else:
            file, *other_files = (f"imagesTr/{held[channel]}" for channel in wanted)
            cases.append(Case(number, file, patient, mask=f"labelsTr/{masks[case]}", others=tuple(other_files)))
    if not one_by_one:
        refuse("data.folder", problems or ([] if cases else lacks))
    left_out = tuple(problems or lacks)
    if told.labels is not None:
        check_labels(told.labels, task)
    if task.channels is not None:
        return LabelTable(tuple(cases), data.folder, data.modality, channels=wanted, left_out=left_out)
    modality = data.modality or modality_named(told.channels.get(str(data.channel), ""))
    channel = data.channel if all(None not in held for held in images.values()) else None
    return LabelTable(tuple(cases), data.folder, modality, channel, left_out=left_out)


def _patient(case: str, pattern: str | None) -> str | None:
    """None: the pattern does not say whose it is."""
    if pattern is None:
        return case
    match = re.search(pattern, case)
    return (match["patient"] or None) if match else None


# ---------------------------------------------------------------------------------------------------------- MedMNIST

_ARRAYS: Mapping[str, Part] = {"train": "train", "val": "validation", "test": "test"}


def _of_medmnist(data: MedMnistData, task: ClassificationConfig) -> tuple[Case, ...]:
    with opened_arrays(data.file, "data.file") as held:
        labels = {name: held[f"{name}_labels"] for name in _ARRAYS}
    cases: list[Case] = []
    for name, part in _ARRAYS.items():
        rows = labels[name].reshape(len(labels[name]), math.prod(labels[name].shape[1:]))
        _check_labels(rows, task, name)
        for row, target in enumerate(rows):
            number = len(cases) + 1
            whole = tuple(int(value) for value in target)
            cases.append(Case(number, "", f"{name}-{row}", target=whole, part=part, place=(f"{name}_images", row)))
    return tuple(cases)


def _check_labels(rows: np.ndarray[Any, Any], task: ClassificationConfig, name: str) -> None:
    columns, most = (len(task.classes), 1) if task.kind == "multi_label" else (1, len(task.classes) - 1)
    values = rows.astype(np.float64)
    if rows.shape[1] != columns or not ((values == np.floor(values)) & (values >= 0) & (values <= most)).all():
        told = f" of values up to {rows.max()}" if rows.size else ""
        raise ConfigError(
            f"data.file: {name}_labels has {rows.shape[1]} column(s){told}; "
            f"expected {columns} of whole numbers from 0 to {most} for {task.kind} of {len(task.classes)} classes"
        )
