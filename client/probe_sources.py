"""Labelled scans to probe an encoder with: folders by label, a table, a MedMNIST file, or a fine-tuning's own file.

FOLDER/LABEL/...       a folder's name labels all scans below it
TABLE.csv              scan, label, patient, perhaps split, as fine-tuning reads them
FILE.npz               MedMNIST; each image counts as a patient
FINETUNE.yaml          a classification's labels and its own split
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from client.csv_tables import Row, rows_of
from client.finetune_config import FinetuneConfig, MedMnistData, load_finetune
from client.label_tables import label_table
from client.labelled import read_cases
from client.medmnist import opened_arrays
from client.reading import Reading, report_looked
from client.reasons import REASONS
from client.site_config import DataSource
from client.splits import split_cases
from unimiss_core import progress
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError
from unimiss_core.scan import Modality, Rank, Scan
from unimiss_core.study import PlanConfig
from unimiss_core.task_config import UNKNOWN, ClassificationConfig

_SHOWN = 5
"""Lines of a table that a note names for one reason."""
_THERE = ("no", "yes")
_SAY_CT = "--modality CT"


@dataclass(frozen=True)
class Known:
    """A scan of which something is known."""

    scan: Scan
    labels: tuple[str, ...]
    """One for each of the source's `questions`; empty where nobody knows."""
    patient: str
    """Not to be shown or written."""
    number: int
    """Its line in a table, its place among all of a MedMNIST file, in a folder that in the order of reading."""
    is_scored: bool
    """Whether the split keeps it for judging; where it keeps none, all are judged in turn."""


class Columns(NamedTuple):
    """What a table's columns are called."""

    scan: str = "scan"
    label: str = "label"
    patient: str = "patient"


Kind = Literal["a folder", "a table", "a MedMNIST file", "a fine-tuning's file"]
_USE: Mapping[str, tuple[Kind, ...]] = {
    "--root": ("a table", "a fine-tuning's file"),
    **dict.fromkeys((f"--{column}" for column in Columns._fields), ("a table",)),
    "--patient-pattern": ("a folder",),
    "--modality": ("a folder", "a table"),
    **dict.fromkeys(("--missing", "--uncertain"), ("a table",)),
}
"""What each option says something about; where it would be passed over in silence it is refused."""


class Source(Protocol):
    questions: tuple[str, ...]
    """What is asked of each scan: one thing, or each label of several that may be there."""
    classes: tuple[str, ...] | None
    """Possible answers, of two the one looked for last; None takes what labels there are, in their order as texts."""

    way_to_name: str | None
    """What the user may say for scans to be read as CT; None where it was said what they are, or never matters."""

    def scans(self, plan: PlanConfig, modality: Modality | None) -> Iterator[Known]:
        """modality: of scans of which neither their files nor the source says it. What cannot be read is left out, and
        told. Raises NoUsableScanError: there is nothing to read."""


def source_of(
    data: Path,
    *,
    root: Path | None = None,
    columns: Mapping[str, str] = {},
    patient_pattern: str | None = None,
    modality: Modality | None = None,
    counts_as: Mapping[str, str] = {},
) -> Source:
    """What --data names. root: where a table's paths begin; None takes the table's own folder. columns: of a
    table, by the names in `Columns`, where they are called otherwise. patient_pattern: as of a site's data folder.
    counts_as: of a table, what its labels count as that are `missing` or `uncertain`, as of `CsvData`.

    Raises ConfigError: also of an option that says nothing about such data."""
    kind = _kind_of(data)
    given = {"--root": root, "--patient-pattern": patient_pattern, "--modality": modality}
    given |= {f"--{name}": told for name, told in (*columns.items(), *counts_as.items())}
    if idle := [name for name in _USE if given.get(name) is not None and kind not in _USE[name]]:
        raise ConfigError(f"{' and '.join(idle)}: of no use where --data is {kind}; leave it out")
    if root is not None and not root.is_dir():
        raise ConfigError(f"--root {root}: is no folder")
    match kind:
        case "a folder":
            return _Folders(data, patient_pattern, modality)
        case "a fine-tuning's file":
            config = load_finetune(data, data_root=root)
            way_to_name = None if isinstance(config.data, MedMnistData) else "data.modality: CT"
            return _Table(config, config.name, way_to_name, by_split=True)
        case "a MedMNIST file":
            return _Table(_of_medmnist(data), data.stem)
        case "a table":
            called = Columns(**columns)
            config = _of_csv(data, root or data.parent, called, modality, counts_as)
            return _Table(config, called.label, way_to_name=_SAY_CT)


def _kind_of(data: Path) -> Kind:
    """Raises ConfigError: there is nothing."""
    if data.is_dir():
        return "a folder"
    if not data.is_file():
        what = "is neither a folder nor a file" if data.exists() else "does not exist"
        raise ConfigError(f"--data {data}: {what}")
    if data.suffix in (".yaml", ".yml"):
        return "a fine-tuning's file"
    return "a MedMNIST file" if data.suffix == ".npz" else "a table"


class _Folders:
    """Scans below folders that are called by their label."""

    def __init__(self, folder: Path, patient_pattern: str | None, modality: Modality | None) -> None:
        self.questions: tuple[str, ...] = (folder.resolve().name,)
        self.classes: tuple[str, ...] | None = None
        raw = {"folder": str(folder), "patient_pattern": patient_pattern, "modality": modality}
        self._source = parse(DataSource, raw, where="--patient-pattern")
        self.way_to_name = None if modality else _SAY_CT

    def scans(self, plan: PlanConfig, modality: Modality | None) -> Iterator[Known]:
        source = self._source.model_copy(update={"modality": self._source.modality or modality})
        reading = Reading.of_sources([source], plan, looked=report_looked)
        bare = 0
        for origin, scan in reading:
            label, _, below = origin.files[0].partition("/")
            bare += not below
            if below:
                yield Known(scan, (label,), origin.patient, origin.number, is_scored=False)
            progress.report(progress.StepDone("scans", origin.number, len(reading), None))
        if not reading.found.files_seen:
            raise NoUsableScanError(f"--data {self._source.folder}: holds no file")
        if bare:
            progress.report(progress.Note(f"left out: {bare} scan(s) that lie in no label's folder"))
        reading.explain()


class _Table:
    """Scans that a table names, or the arrays of a MedMNIST file."""

    def __init__(
        self, config: FinetuneConfig, question: str, way_to_name: str | None = None, *, by_split: bool = False
    ) -> None:
        """question: what is asked where it is one thing. way_to_name: as of `Source`, where the table does not say it.
        by_split: those are judged whom this fine-tuning would test on, not whom the table names. Raises ConfigError."""
        if not isinstance(config.task, ClassificationConfig):
            raise ConfigError("--data: names masks; a probe is of classes, so give a classification's file")
        if config.task.channels is not None:
            raise ConfigError(
                f"--data: its scans have {len(config.task.channels)} channels, and a probe takes each file for a scan; "
                "give a table of one of them, with scan, label and patient"
            )
        self._config, self._task = config, config.task
        self._table = label_table(config)
        self.way_to_name = None if self._table.modality else way_to_name
        cases = self._table.cases
        tested = split_cases(cases, config)["test"] if by_split else [case for case in cases if case.part == "test"]
        self._tested = {case.number for case in tested}
        both = {c.patient for c in cases if c.number in self._tested} & {
            c.patient for c in cases if c.number not in self._tested
        }
        if both:
            raise ConfigError(
                f"--data: {len(both)} patient(s) stand in the test part and in another; keep them together"
            )
        several = self._task.kind == "multi_label"
        self.questions = self._task.classes if several else (question,)
        self.classes: tuple[str, ...] | None = _THERE if several else self._task.classes

    def scans(self, plan: PlanConfig, modality: Modality | None) -> Iterator[Known]:
        cases, left_out = self._table.cases, dict[str, list[int]]()
        table = replace(self._table, modality=self._table.modality or modality)
        for number, (case, scans, _) in enumerate(read_cases(cases, table, self._config, plan), start=1):
            if isinstance(scans, ScanError):
                left_out.setdefault(scans.reason, []).append(case.number)
            else:
                yield Known(scans[0], self._labels(case.target), case.patient, case.number, case.number in self._tested)
            progress.report(progress.StepDone("scans", number, len(cases), None))
        for reason, lines in left_out.items():
            told = ", ".join(map(str, lines[:_SHOWN])) + (" and others" if len(lines) > _SHOWN else "")
            progress.report(progress.Note(f"left out: {len(lines)} {reason} (line {told}): {REASONS[reason]}"))

    def _labels(self, target: Sequence[int]) -> tuple[str, ...]:
        if self._task.kind == "multi_label":
            return tuple("" if there == UNKNOWN else _THERE[there] for there in target)
        return (self._task.classes[target[0]],)


def _of_csv(
    table: Path, root: Path, columns: Columns, modality: Modality | None, counts_as: Mapping[str, str]
) -> FinetuneConfig:
    """What a fine-tuning's file would say of the table. Raises ConfigError."""
    there, rows = rows_of(table, named=table.name)
    if not there:
        raise ConfigError(f"table {table.name}: holds no rows")
    if missing := [name for name in columns if name not in there]:
        raise ConfigError(
            f"table {table.name}: has no column {', '.join(missing)}; give --scan, --label or --patient "
            "where they are called otherwise"
        )
    classes = _labels_in(rows, columns.label, table.name, counts_as)
    data = {"table": str(table.absolute()), "folder": str(root.absolute()), "modality": modality}
    data |= {**columns._asdict(), **counts_as}
    return _config(classes, data, where=f"table {table.name}", is_given="split" in there)


def _labels_in(rows: Sequence[Row], column: str, table: str, counts_as: Mapping[str, str]) -> list[str]:
    """Each once, in their order as texts; 0 and 1 where they are such by what `counts_as` asks. Raises ConfigError:
    there is no line, or a line without one."""
    if not rows:
        raise ConfigError(f"table {table}: holds no rows")
    bare = [row.number for row in rows if not row.cells[column]]
    if bare and "missing" not in counts_as:
        raise ConfigError(
            f"table {table}: {len(bare)} line(s) have no label in column '{column}', as line {bare[0]}; label each "
            "scan, or take its line out: with --missing ignore it is left out"
        )
    if "uncertain" in counts_as or counts_as.get("missing") == "zeros":
        return ["0", "1"]
    return sorted({row.cells[column] for row in rows} - {""})


def _of_medmnist(file: Path) -> FinetuneConfig:
    """Classes are called by their numbers. Raises ConfigError."""
    with opened_arrays(file, f"--data {file}") as held:
        labels = [held[f"{part}_labels"] for part in ("train", "val", "test")]
        shape = held["test_images"].shape
    columns = {math.prod(each.shape[1:]) for each in labels}
    several = max(columns) if columns != {1} else 0
    classes = several or 1 + max(int(np.nan_to_num(each).max()) for each in labels if each.size)
    data = {"name": "medmnist", "file": str(file.absolute())}
    return _config(
        [str(number) for number in range(classes)],
        data,
        where=f"--data {file}",
        is_given=True,
        rank=3 if len(shape) == 4 and shape[-1] != 3 else 2,
        several=bool(several),
    )


def _config(
    classes: Sequence[str], data: dict[str, Any], *, where: str, is_given: bool, rank: Rank = 3, several: bool = False
) -> FinetuneConfig:
    if len(classes) < 2:
        raise ConfigError(f"{where}: holds one class alone; a probe tells at least two apart")
    task = {
        "kind": "multi_label" if several else "binary" if len(classes) == 2 else "multi_class",
        "rank": rank,
        "classes": list(classes),
    }
    split = {"name": "given" if is_given else "folds"}
    raw = {"name": "probe", "task": task, "init": {"name": "scratch"}, "data": data, "split": split}
    return parse(FinetuneConfig, raw, where=where)
